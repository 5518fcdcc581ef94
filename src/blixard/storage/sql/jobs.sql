-- name: add_jobs
-- Submit jobs of one spec. :plain is {id: arguments as text, …} with all else at its default; of others, :special is
-- [[id, priority, run_at, arguments as text, arguments_blob, inputs], …]. Ids that exist are left alone and not returned.
INSERT INTO jobs (
    namespace, id, spec_id, class_id, state, is_ready, priority, run_at, max_retries, max_lost,
    arguments, arguments_blob, inputs, batch, batch_index, created_at, updated_at
)
SELECT
    :namespace, new_id, :spec_id, :class_id, 'pending', new_run_at <= :now, new_priority, new_run_at, :max_retries, :max_lost,
    new_arguments, new_arguments_blob, new_inputs, :batch, CAST(substr(new_id, length(:batch) + 2) AS INTEGER), :now, :now
FROM (
    SELECT
        key AS new_id, 0 AS new_priority, :now AS new_run_at, value AS new_arguments, NULL AS new_arguments_blob, NULL AS new_inputs
    FROM json_each(:plain)
    UNION ALL
    SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5 FROM json_each(:special)
)
WHERE true
ON CONFLICT (namespace, id) DO NOTHING
RETURNING id;

-- name: find_identities
-- What tells a repeated submission from a different job with the same id.
SELECT jobs.id, specs.digest, jobs.arguments, jobs.arguments_blob, jobs.inputs
FROM json_each(:ids) AS wanted
CROSS JOIN jobs ON jobs.namespace = :namespace AND jobs.id = wanted.value
JOIN specs ON specs.id = jobs.spec_id;

-- name: find_job
-- One job with its spec, by primary key.
-- quick
SELECT
    jobs.id, jobs.namespace, specs.body, jobs.state, jobs.priority, jobs.created_at, jobs.updated_at, jobs.run_at,
    jobs.started_at, jobs.finished_at, jobs.attempt, jobs.failures, jobs.lost, jobs.cancel_requested_at,
    jobs.arguments, jobs.arguments_blob, jobs.inputs, jobs.batch, jobs.batch_index,
    jobs.session, jobs.worker, jobs.claimed_at, jobs.result, jobs.result_blob, jobs.exit_code, jobs.error, jobs.outcome
FROM jobs JOIN specs ON specs.id = jobs.spec_id
WHERE jobs.namespace = :namespace AND jobs.id = :id;

-- name: find_jobs
-- The same columns for several ids, each by primary key.
SELECT
    jobs.id, jobs.namespace, specs.body, jobs.state, jobs.priority, jobs.created_at, jobs.updated_at, jobs.run_at,
    jobs.started_at, jobs.finished_at, jobs.attempt, jobs.failures, jobs.lost, jobs.cancel_requested_at,
    jobs.arguments, jobs.arguments_blob, jobs.inputs, jobs.batch, jobs.batch_index,
    jobs.session, jobs.worker, jobs.claimed_at, jobs.result, jobs.result_blob, jobs.exit_code, jobs.error, jobs.outcome
FROM json_each(:ids) AS wanted
CROSS JOIN jobs ON jobs.namespace = :namespace AND jobs.id = wanted.value
JOIN specs ON specs.id = jobs.spec_id
ORDER BY wanted.key;

-- name: find_results
-- How some jobs ended, for those who wait: state first, nothing heavy for those that run.
-- quick
SELECT
    jobs.id, jobs.state, jobs.outcome, jobs.exit_code, jobs.result, jobs.result_blob, jobs.error, jobs.attempt, jobs.batch_index
FROM json_each(:ids) AS wanted
CROSS JOIN jobs ON jobs.namespace = :namespace AND jobs.id = wanted.value;

-- name: list_ids_by_state
-- Jobs of some states behind the cursor (created_at, seq), newest first, one seek per state; leased ones are found by session.
SELECT id, created_at, seq FROM (
    SELECT picked.value ->> 0 AS created_at, picked.value ->> 1 AS seq, picked.value ->> 2 AS id
    FROM json_each(:states) AS wanted, json_each((
        SELECT json_group_array(json_array(created_at, seq, id)) FROM (
            SELECT created_at, seq, id FROM jobs INDEXED BY jobs_by_state
            WHERE namespace = :namespace AND state = wanted.value AND state NOT IN ('claimed', 'in_progress')
                AND (created_at, seq) < (:cursor_at, :cursor) AND created_at >= :since AND created_at < :until
            ORDER BY created_at DESC, seq DESC LIMIT :limit
        )
    )) AS picked
    UNION ALL
    SELECT created_at, seq, id FROM jobs INDEXED BY jobs_leased
    WHERE state IN ('claimed', 'in_progress') AND session IN (SELECT id FROM sessions)
        AND state IN (SELECT value FROM json_each(:states)) AND namespace = :namespace
        AND (created_at, seq) < (:cursor_at, :cursor) AND created_at >= :since AND created_at < :until
)
ORDER BY created_at DESC, seq DESC LIMIT :limit;

-- name: list_ids_by_spec
-- The same for jobs of some specs (found by name, queue or tag), one seek per spec.
SELECT picked.value ->> 2 AS id, picked.value ->> 0 AS created_at, picked.value ->> 1 AS seq
FROM json_each(:specs) AS spec, json_each((
    SELECT json_group_array(json_array(created_at, seq, id)) FROM (
        SELECT created_at, seq, id FROM jobs INDEXED BY jobs_by_spec
        WHERE spec_id = spec.value AND namespace = :namespace
            AND (created_at, seq) < (:cursor_at, :cursor) AND created_at >= :since AND created_at < :until
            AND (:any_state OR state IN (SELECT value FROM json_each(:states)))
        ORDER BY created_at DESC, seq DESC LIMIT :limit
    )
)) AS picked
ORDER BY created_at DESC, seq DESC LIMIT :limit;

-- name: list_ids_of_batch
-- Jobs of a batch, whose ids share a prefix, from its last to its first; :before is the id of the last one seen.
SELECT id, created_at, batch_index FROM jobs
WHERE namespace = :namespace AND id >= :batch || '.' AND id < :batch || '/' AND id < :before AND batch = :batch
    AND created_at >= :since AND created_at < :until
    AND (:any_state OR state IN (SELECT value FROM json_each(:states)))
ORDER BY id DESC LIMIT :limit;

-- name: find_spec_ids
-- Specs by name, queue and tag, any of them left open by NULL.
SELECT specs.id FROM specs
WHERE specs.namespace = :namespace
    AND (:name IS NULL OR specs.name = :name)
    AND (:queue IS NULL OR specs.class_id IN (SELECT id FROM placement_classes WHERE namespace = :namespace AND queue = :queue))
    AND (:tag IS NULL OR specs.id IN (SELECT spec_id FROM spec_tags WHERE namespace = :namespace AND tag = :tag));

-- name: count_jobs
-- Jobs by queue and state, from the counters.
SELECT c.queue, n.state, sum(n.n)
FROM class_counts AS n JOIN placement_classes AS c ON c.id = n.class_id
WHERE c.namespace = :namespace AND n.n > 0
GROUP BY c.queue, n.state;

-- name: list_attempts
-- Ended attempts of one job.
SELECT attempt, session, worker, claimed_at, started_at, finished_at, outcome, exit_code, error
FROM attempts WHERE job = (SELECT seq FROM jobs WHERE namespace = :namespace AND id = :id) ORDER BY attempt;

-- name: list_events
-- The last events of one job, in order.
SELECT seq, id, type, attempt, at, batch, worker FROM (
    SELECT events.seq, jobs.id, events.type, events.attempt, events.at, jobs.batch, events.worker
    FROM jobs CROSS JOIN events ON events.job = jobs.seq
    WHERE jobs.namespace = :namespace AND jobs.id = :id ORDER BY events.seq DESC LIMIT :limit
) ORDER BY seq;

-- name: cancel_jobs
-- Cancel: at once what has no lease, by request to the worker what has one. Ended jobs are left alone and not returned.
UPDATE jobs SET
    state = CASE WHEN state IN ('blocked', 'pending') THEN 'cancelled' ELSE state END,
    finished_at = CASE WHEN state IN ('blocked', 'pending') THEN :now END,
    outcome = CASE WHEN state IN ('blocked', 'pending') THEN 'cancelled' ELSE outcome END,
    is_ready = 0,
    cancel_requested_at = coalesce(cancel_requested_at, :now),
    updated_at = :now
WHERE namespace = :namespace AND id IN (SELECT value FROM json_each(:ids))
    AND state NOT IN ('completed', 'failed', 'cancelled')
RETURNING id, state, session, batch;

-- name: retry_jobs
-- Reopen failed and cancelled jobs with their counters set back. Others are left alone and not returned.
UPDATE jobs SET
    state = 'pending', is_ready = 1, run_at = :now, failures = 0, lost = 0, finished_at = NULL, started_at = NULL,
    cancel_requested_at = NULL, outcome = NULL, exit_code = NULL, error = NULL, result = NULL, result_blob = NULL,
    session = NULL, worker = NULL, claimed_at = NULL, claim_number = NULL, updated_at = :now
WHERE namespace = :namespace AND id IN (SELECT value FROM json_each(:ids)) AND state IN ('failed', 'cancelled')
RETURNING id, class_id;

-- name: position_in_class
-- How many due jobs of its class a worker would take before this one (counted up to :limit).
SELECT count(*) FROM (
    SELECT 1 FROM jobs AS mine CROSS JOIN jobs AS other ON other.class_id = mine.class_id AND other.is_ready = 1
    WHERE mine.namespace = :namespace AND mine.id = :id
        AND (other.priority > mine.priority OR (other.priority = mine.priority AND (other.run_at, other.seq) < (mine.run_at, mine.seq)))
    LIMIT :limit
);

-- name: find_class_of_job
-- The placement class of one job and whether it is due.
-- quick
SELECT class_id, is_ready FROM jobs WHERE namespace = :namespace AND id = :id;
