-- name: add_class
-- Store a placement class once; the id comes back whether it is new or not.
INSERT INTO placement_classes (namespace, queue, worker_type, isolation, labels, cpus, memory_mb, submitter, is_open, created_at)
VALUES (:namespace, :queue, :worker_type, :isolation, :labels, :cpus, :memory_mb, :submitter, :submitter = '', :now)
ON CONFLICT (namespace, queue, worker_type, isolation, labels, cpus, memory_mb, submitter) DO UPDATE SET created_at = excluded.created_at
RETURNING id;

-- name: add_spec
-- Store a spec once per placement class; the id comes back whether it is new or not. Using it makes it young, so the pruner leaves it.
INSERT INTO specs (namespace, digest, class_id, name, body, created_at)
VALUES (:namespace, :digest, :class_id, :name, :body, :now)
ON CONFLICT (namespace, digest, class_id) DO UPDATE SET created_at = excluded.created_at
RETURNING id;

-- name: find_specs
-- Specs by id.
-- quick
SELECT id, body FROM specs WHERE id IN (SELECT value FROM json_each(:ids));

-- name: list_classes
-- Placement classes above an id: new ones only ever get higher ids.
-- quick
SELECT id, namespace, queue, worker_type, isolation, labels, cpus, memory_mb, submitter, is_open
FROM placement_classes WHERE id > :after ORDER BY id;

-- name: find_class
-- One placement class.
SELECT id, namespace, queue, worker_type, isolation, labels, cpus, memory_mb, submitter, is_open
FROM placement_classes WHERE id = :id;

-- name: list_closed_submitters
-- Embedded processes whose classes no other worker may take from, for the adopter to test for life.
SELECT DISTINCT submitter FROM placement_classes WHERE is_open = 0 ORDER BY submitter;

-- name: open_classes
-- Let every worker run what dead submitters left behind.
UPDATE placement_classes SET is_open = 1
WHERE is_open = 0 AND submitter IN (SELECT value FROM json_each(:submitters))
RETURNING id;

-- name: has_ready_job
-- Is anything due in one of these classes? One seek per class.
-- quick
SELECT EXISTS (
    SELECT 1 FROM json_each(:classes) AS c
    WHERE EXISTS (SELECT 1 FROM jobs WHERE class_id = c.value AND is_ready = 1)
);

-- name: delete_unused_classes
-- Remove placement classes that nothing refers to any more, oldest first.
DELETE FROM placement_classes
WHERE id IN (
    SELECT c.id FROM placement_classes AS c
    WHERE c.created_at < :before AND NOT EXISTS (SELECT 1 FROM specs AS s WHERE s.class_id = c.id)
    ORDER BY c.id LIMIT :limit
)
RETURNING id;

-- name: delete_counts_of_missing_classes
-- Remove the counters of placement classes that are gone.
DELETE FROM class_counts WHERE class_id IN (SELECT value FROM json_each(:classes));
