-- name: add_batch
-- Make a batch; a repetition changes nothing.
INSERT INTO batches (namespace, id, name, identity, generation, total, created_at)
VALUES (:namespace, :id, :name, :identity, :generation, :total, :now)
ON CONFLICT (namespace, id) DO NOTHING
RETURNING id;

-- name: find_batch
-- One batch.
-- quick
SELECT id, namespace, name, identity, generation, total, created_at FROM batches WHERE namespace = :namespace AND id = :id;

-- name: find_newest_batch
-- The newest generation of an identity.
SELECT id, namespace, name, identity, generation, total, created_at FROM batches
WHERE namespace = :namespace AND identity = :identity ORDER BY generation DESC LIMIT 1;

-- name: find_batch_of_name
-- The newest batch of this name that computes something else.
SELECT id, namespace, name, identity, generation, total, created_at FROM batches
WHERE namespace = :namespace AND name = :name AND identity <> :identity ORDER BY created_at DESC LIMIT 1;

-- name: count_batch
-- Jobs of a batch by state, from the counters.
-- quick
SELECT state, n FROM batch_counts WHERE namespace = :namespace AND batch = :batch AND n > 0;

-- name: last_batch_index
-- The highest index that was submitted.
-- quick
SELECT batch_index FROM jobs
WHERE namespace = :namespace AND id >= :batch || '.' AND id < :batch || '/' ORDER BY id DESC LIMIT 1;

-- name: list_batch_ids
-- Ids of a batch in some states, in order, behind a cursor.
SELECT id FROM jobs
WHERE namespace = :namespace AND id > :after AND id >= :batch || '.' AND id < :batch || '/'
    AND +state IN (SELECT value FROM json_each(:states))
ORDER BY id LIMIT :limit;

-- name: list_batch_results
-- Jobs of a batch that ended behind a position of the outbox, as they stand now.
SELECT e.seq, jobs.id, jobs.state, jobs.outcome, jobs.exit_code, jobs.result, jobs.result_blob, jobs.error, jobs.attempt, jobs.batch_index
FROM (
    SELECT seq, job FROM events
    WHERE namespace = :namespace AND batch = :batch AND seq > :after
    ORDER BY seq LIMIT :limit
) AS e
JOIN jobs ON jobs.seq = e.job
ORDER BY e.seq;
