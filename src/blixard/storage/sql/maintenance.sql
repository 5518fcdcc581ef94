-- name: promote_jobs
-- Make due jobs ready to be claimed, oldest first.
UPDATE jobs SET is_ready = 1, updated_at = :now
WHERE seq IN (
    SELECT seq FROM jobs WHERE state = 'pending' AND is_ready = 0 AND run_at <= :now ORDER BY run_at LIMIT :limit
) AND state = 'pending'
RETURNING class_id;

-- name: next_run_at
-- When the next job falls due.
-- quick
SELECT min(run_at) FROM jobs WHERE state = 'pending' AND is_ready = 0;

-- name: delete_finished_jobs
-- Remove ended jobs past their retention, oldest first; triggers remove their attempts and blob references.
DELETE FROM jobs WHERE seq IN (
    SELECT seq FROM jobs
    WHERE finished_at IS NOT NULL AND finished_at < :finished_before AND state IN (SELECT value FROM json_each(:states))
    ORDER BY finished_at LIMIT :limit
)
RETURNING namespace, id, attempt;

-- name: delete_events
-- Remove events past their retention, oldest first. The newest stays, so that positions are never given twice.
DELETE FROM events WHERE seq IN (
    SELECT seq FROM events WHERE at < :before AND seq < (SELECT max(seq) FROM events) ORDER BY seq LIMIT :limit
) AND at < :before
RETURNING seq;

-- name: end_of_spec_stretch
-- The last id of the next :limit specs behind :after; NULL behind the last one.
SELECT max(id) FROM (SELECT id FROM specs WHERE id > :after ORDER BY id LIMIT :limit);

-- name: delete_unused_specs
-- Remove old specs without jobs within one stretch of ids.
DELETE FROM specs
WHERE id > :after AND id <= :last AND created_at < :before
    AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.spec_id = specs.id)
RETURNING id;

-- name: delete_ended_sessions
-- Remove sessions that ended long ago and hold nothing.
DELETE FROM sessions WHERE id IN (
    SELECT id FROM sessions WHERE ended_at IS NOT NULL AND ended_at < :before
        AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.session = sessions.id AND jobs.state IN ('claimed', 'in_progress'))
    ORDER BY ended_at LIMIT :limit
)
RETURNING id;

-- name: delete_empty_batches
-- Remove old batches without jobs.
DELETE FROM batches WHERE (namespace, id) IN (
    SELECT b.namespace, b.id FROM batches AS b
    WHERE b.created_at < :before AND NOT EXISTS (
        SELECT 1 FROM jobs WHERE jobs.namespace = b.namespace AND jobs.id >= b.id || '.' AND jobs.id < b.id || '/'
    )
    LIMIT :limit
)
RETURNING id;

-- name: find_referenced_blobs
-- Of these digests, those that something refers to.
SELECT DISTINCT r.digest FROM json_each(:digests) AS d JOIN blob_refs AS r ON r.digest = d.value;
