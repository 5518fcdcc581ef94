-- name: add_session
-- Register one life of a worker; a repetition changes nothing.
INSERT INTO sessions (id, namespace, name, offer, state, host, pid, interpreter, registered_at, seen_at, token)
VALUES (:id, :namespace, :name, :offer, 'online', :host, :pid, :interpreter, :now, :now, :token)
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: find_session
-- One session.
-- quick
SELECT id, namespace, name, offer, state, host, pid, interpreter, registered_at, seen_at, renewals, last_number, token
FROM sessions WHERE id = :id;

-- name: list_sessions
-- Sessions that are alive, with the number of leases each holds, counted from the jobs.
SELECT id, namespace, name, offer, state, host, pid, interpreter, registered_at, seen_at, renewals, last_number, token,
    (SELECT count(*) FROM jobs WHERE jobs.session = sessions.id AND jobs.state IN ('claimed', 'in_progress')) AS leased
FROM sessions
WHERE namespace = :namespace AND state IN ('online', 'draining')
ORDER BY id LIMIT :limit;

-- name: list_watched_sessions
-- What the rescuer watches: sessions that live, and dead or closed ones that still hold leases.
SELECT id, state, host, renewals FROM sessions WHERE state IN ('online', 'draining')
UNION ALL
SELECT id, state, host, renewals FROM sessions
WHERE state IN ('dead', 'closed')
    AND EXISTS (SELECT 1 FROM jobs WHERE jobs.session = sessions.id AND jobs.state IN ('claimed', 'in_progress'));

-- name: drain_session
-- Give it nothing new.
UPDATE sessions SET state = 'draining' WHERE id = :id AND namespace = :namespace AND state IN ('online', 'draining')
RETURNING id;

-- name: expire_session
-- Declare a session dead, if it has not renewed since it was watched.
UPDATE sessions SET state = 'dead', ended_at = :now
WHERE id = :id AND renewals = :renewals AND state IN ('online', 'draining')
RETURNING id;

-- name: close_session
-- A worker says good-bye.
UPDATE sessions SET state = 'closed', ended_at = :now
WHERE id = :id AND namespace = :namespace AND token = :token AND state IN ('online', 'draining')
RETURNING id;
