-- name: renew_session
-- Count a sync: the counter is what a rescuer watches. A repeated number counts as a renewal but not as a new request.
UPDATE sessions SET renewals = renewals + 1, last_number = max(last_number, :number), seen_at = :now
WHERE id = :session AND namespace = :namespace AND state IN ('online', 'draining')
RETURNING state;

-- name: claim_jobs
-- Lease up to :want due jobs of the given classes to a session, best first: one seek per class, then a merge of the heads.
-- A repeated number claims nothing more: see find_claimed.
UPDATE jobs SET
    state = 'claimed', is_ready = 0, attempt = attempt + 1, session = :session, worker = :worker, claim_number = :number,
    claimed_at = :now, updated_at = :now, started_at = NULL, outcome = NULL, exit_code = NULL, error = NULL
FROM (
    SELECT head.value ->> 0 AS picked_seq
    FROM json_each(:classes) AS c, json_each((
        SELECT json_group_array(json_array(seq, priority, run_at)) FROM (
            SELECT seq, priority, run_at FROM jobs
            WHERE class_id = c.value AND is_ready = 1
            ORDER BY priority DESC, run_at, seq LIMIT :want
        )
    )) AS head
    WHERE EXISTS (SELECT 1 FROM sessions WHERE id = :session AND state = 'online')
        AND NOT EXISTS (
            SELECT 1 FROM jobs WHERE session = :session AND claim_number = :number AND state IN ('claimed', 'in_progress')
        )
    ORDER BY head.value ->> 1 DESC, head.value ->> 2, head.value ->> 0
    LIMIT :want
) AS picked
WHERE jobs.seq = picked_seq AND jobs.attempt < :max_attempts
RETURNING namespace, id, attempt, spec_id, arguments, arguments_blob, inputs, priority, run_at, seq;

-- name: find_claimed
-- What a sync with this number claimed and still holds: the answer to its repetition.
-- quick
SELECT namespace, id, attempt, spec_id, arguments, arguments_blob, inputs, priority, run_at, seq
FROM jobs WHERE session = :session AND claim_number = :number AND state IN ('claimed', 'in_progress');

-- name: start_attempts
-- Claimed becomes in progress: [[namespace, id, attempt, started_at], …]. Stale attempts change nothing.
WITH element AS MATERIALIZED (
    SELECT value FROM json_each(:reports)
), report AS MATERIALIZED (
    SELECT value ->> 0 AS r_namespace, value ->> 1 AS r_id, value ->> 2 AS r_attempt, value ->> 3 AS r_started_at FROM element
)
UPDATE jobs SET state = 'in_progress', started_at = r_started_at, updated_at = :now
FROM report
WHERE jobs.namespace = r_namespace AND jobs.id = r_id AND jobs.attempt = r_attempt
    AND +jobs.session = :session AND +jobs.state = 'claimed'
    AND EXISTS (SELECT 1 FROM sessions WHERE sessions.id = :session AND sessions.state IN ('online', 'draining'))
RETURNING id, attempt;

-- name: complete_attempts
-- End attempts that completed and left no more than a result of text, which is nearly all of them: {job id: [attempt, started_at, result], …}.
-- Guarded as finish_attempts.
WITH report AS MATERIALIZED (
    -- the namespace as a column: compared with the parameter itself, it makes the planner begin with all jobs of the namespace
    SELECT :namespace AS r_namespace, key AS r_id, value AS r_report FROM json_each(:reports)
)
UPDATE jobs SET
    state = 'completed', outcome = 'completed', started_at = coalesce(r_report ->> 1, started_at), finished_at = :now, updated_at = :now,
    result = r_report ->> 2
FROM report
WHERE jobs.namespace = r_namespace AND jobs.id = r_id AND jobs.attempt = r_report ->> 0
    AND +jobs.session = :session AND +jobs.state IN ('claimed', 'in_progress')
    AND EXISTS (SELECT 1 FROM sessions WHERE sessions.id = :session AND sessions.state IN ('online', 'draining'))
RETURNING id, attempt;

-- name: finish_attempts
-- End attempts in any way: [[namespace, id, attempt, outcome, started_at, finished_at, exit_code, result, result_blob, error, is_retryable, retry_at], …].
-- Guarded by (state, attempt, session), and the session must be alive: a stale report changes nothing and is not returned.
WITH element AS MATERIALIZED (
    SELECT value FROM json_each(:reports)  -- json_each writes out value each time it is asked for
), report AS MATERIALIZED (
    SELECT
        value ->> 0 AS r_namespace, value ->> 1 AS r_id, value ->> 2 AS r_attempt, value ->> 3 AS r_outcome,
        value ->> 4 AS r_started_at, value ->> 5 AS r_finished_at, value ->> 6 AS r_exit_code, value ->> 7 AS r_result,
        value ->> 8 AS r_result_blob, value -> 9 AS r_error, value ->> 10 AS r_is_retryable, value ->> 11 AS r_retry_at
    FROM element
), decided AS MATERIALIZED (
    SELECT report.*, jobs.seq AS r_seq, CASE
        WHEN r_outcome IN ('completed', 'cancelled') THEN r_outcome
        WHEN jobs.cancel_requested_at IS NOT NULL THEN 'cancelled'
        WHEN r_outcome = 'released' THEN 'pending'
        WHEN r_outcome = 'lost' THEN iif(jobs.lost < jobs.max_lost, 'pending', 'failed')
        ELSE iif(r_is_retryable AND jobs.failures < jobs.max_retries, 'pending', 'failed')
    END AS r_state
    FROM report CROSS JOIN jobs
    WHERE jobs.namespace = r_namespace AND jobs.id = r_id AND jobs.attempt = r_attempt
        AND +jobs.session = :session AND +jobs.state IN ('claimed', 'in_progress')
        AND EXISTS (SELECT 1 FROM sessions WHERE sessions.id = :session AND sessions.state IN ('online', 'draining'))
)
UPDATE jobs SET
    state = r_state,
    is_ready = r_state = 'pending' AND coalesce(r_retry_at, 0) <= :now,
    run_at = iif(r_state = 'pending', coalesce(r_retry_at, run_at), run_at),
    failures = failures + (r_outcome IN ('failed', 'timed_out')),
    lost = lost + (r_outcome = 'lost'),
    started_at = coalesce(r_started_at, started_at),
    finished_at = iif(r_state = 'pending', NULL, coalesce(r_finished_at, :now)),
    outcome = iif(r_state = 'cancelled', 'cancelled', r_outcome),
    exit_code = r_exit_code,
    result = r_result,
    result_blob = r_result_blob,
    error = nullif(r_error, 'null'),
    updated_at = :now
FROM decided
WHERE jobs.seq = r_seq
RETURNING id, attempt;

-- name: find_attempt_outcomes
-- Of reported attempts [[namespace, id, attempt], …]: those that this session has already ended, so the report was a repetition.
SELECT jobs.namespace, jobs.id, a.attempt
FROM json_each(:reports) AS r
CROSS JOIN jobs ON jobs.namespace = r.value ->> 0 AND jobs.id = r.value ->> 1
CROSS JOIN attempts AS a ON a.job = jobs.seq AND a.attempt = r.value ->> 2
WHERE a.session = :session;

-- name: find_retry_facts
-- What decides about the delay before the next attempt.
SELECT jobs.namespace, jobs.id, jobs.failures, specs.body ->> '$.retry'
FROM json_each(:ids) AS r
CROSS JOIN jobs ON jobs.namespace = r.value ->> 0 AND jobs.id = r.value ->> 1
JOIN specs ON specs.id = jobs.spec_id;

-- name: list_cancelled
-- Leases of a session whose end was asked for.
-- quick
SELECT namespace, id, attempt FROM jobs
WHERE session = :session AND cancel_requested_at IS NOT NULL AND state IN ('claimed', 'in_progress');

-- name: list_leases
-- What a session holds, with the number of the sync that claimed it.
SELECT namespace, id, attempt, claim_number FROM jobs
WHERE session = :session AND state IN ('claimed', 'in_progress');

-- name: lose_leases
-- Take leases away from a session, at most :limit: [] means any, else [[namespace, id, attempt], …].
-- What was only claimed goes back for nothing; what was started costs one of max_lost.
WITH picked AS MATERIALIZED (
    SELECT seq AS p_seq FROM jobs
    WHERE session = :session AND state IN ('claimed', 'in_progress')
        AND (:refs = '[]' OR (namespace, id, attempt) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(:refs)))
    LIMIT :limit
)
UPDATE jobs SET
    state = CASE
        WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
        WHEN attempt >= :max_attempts THEN 'failed'
        WHEN +state = 'in_progress' AND lost >= max_lost THEN 'failed'
        ELSE 'pending'
    END,
    is_ready = cancel_requested_at IS NULL AND attempt < :max_attempts AND NOT (+state = 'in_progress' AND lost >= max_lost),
    finished_at = iif(
        cancel_requested_at IS NOT NULL OR attempt >= :max_attempts OR (+state = 'in_progress' AND lost >= max_lost), :now, NULL
    ),
    outcome = CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled' WHEN +state = 'in_progress' OR attempt >= :max_attempts THEN 'lost' ELSE 'released' END,
    lost = lost + (+state = 'in_progress'),
    exit_code = NULL,
    error = iif(+state = 'in_progress' OR attempt >= :max_attempts, json_object('type', 'WorkerLost', 'message', :message), NULL),
    updated_at = :now
FROM picked
WHERE jobs.seq = p_seq
RETURNING id, state, class_id, batch;
