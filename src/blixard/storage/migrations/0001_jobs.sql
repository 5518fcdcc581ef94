-- phase: before
-- Jobs, their specs, placement classes, leases and history. Times are microseconds since 1970; JSON columns are TEXT.

-- Ids of classes and specs are never given twice: they are remembered outside the store.
CREATE TABLE placement_classes (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace   TEXT    NOT NULL,
    queue       TEXT    NOT NULL,
    worker_type TEXT    NOT NULL CHECK (worker_type IN ('process', 'wasm', 'microvm')),
    isolation   TEXT    NOT NULL CHECK (isolation IN ('minimal', 'standard', 'maximum')),
    labels      TEXT    NOT NULL,
    cpus        REAL    NOT NULL,
    memory_mb   INTEGER NOT NULL,
    submitter   TEXT    NOT NULL,
    is_open     INTEGER NOT NULL CHECK (is_open IN (0, 1)),
    created_at  INTEGER NOT NULL,
    UNIQUE (namespace, queue, worker_type, isolation, labels, cpus, memory_mb, submitter)
) STRICT;

-- The classes whose submitter may have died.
CREATE INDEX placement_classes_closed ON placement_classes (submitter) WHERE is_open = 0;

CREATE TABLE specs (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace   TEXT    NOT NULL,
    digest      TEXT    NOT NULL,
    class_id    INTEGER NOT NULL REFERENCES placement_classes (id),
    name        TEXT    NOT NULL,
    body        TEXT    NOT NULL,
    created_at  INTEGER NOT NULL,
    UNIQUE (namespace, digest, class_id)
) STRICT;

CREATE INDEX specs_by_name ON specs (namespace, name);
CREATE INDEX specs_by_class ON specs (class_id);

CREATE TABLE spec_tags (
    namespace TEXT    NOT NULL,
    tag       TEXT    NOT NULL,
    spec_id   INTEGER NOT NULL,
    PRIMARY KEY (namespace, tag, spec_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE blob_refs (
    digest    TEXT    NOT NULL,
    namespace TEXT    NOT NULL,
    owner     TEXT    NOT NULL,
    PRIMARY KEY (digest, namespace, owner)
) STRICT, WITHOUT ROWID;

CREATE INDEX blob_refs_by_owner ON blob_refs (namespace, owner);

CREATE TRIGGER specs_added AFTER INSERT ON specs BEGIN
    INSERT INTO spec_tags (namespace, tag, spec_id)
    SELECT DISTINCT NEW.namespace, value, NEW.id FROM json_each(NEW.body, '$.tags');
    INSERT INTO blob_refs (digest, namespace, owner)
    SELECT digest, NEW.namespace, 'spec:' || NEW.id
    FROM (SELECT NEW.body ->> '$.payload.bundle' AS digest UNION SELECT NEW.body ->> '$.payload.module')
    WHERE digest IS NOT NULL;
END;

CREATE TRIGGER specs_removed AFTER DELETE ON specs BEGIN
    DELETE FROM spec_tags WHERE spec_id = OLD.id AND namespace = OLD.namespace
        AND tag IN (SELECT value FROM json_each(OLD.body, '$.tags'));
    DELETE FROM blob_refs WHERE namespace = OLD.namespace AND owner = 'spec:' || OLD.id;
END;

-- A job is known by its id to everybody outside and by its number in here: rows and indexes are half as large as with ids in all of them.
-- Numbers rise in the order of submission and are never given twice. One CHECK compares the state once; an IN list builds a table for every row.
CREATE TABLE jobs (
    seq            INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace      TEXT    NOT NULL,
    id             TEXT    NOT NULL CHECK (length(id) BETWEEN 1 AND 255),
    spec_id        INTEGER NOT NULL,
    class_id       INTEGER NOT NULL,
    state          TEXT    NOT NULL,
    is_ready       INTEGER NOT NULL,
    priority       INTEGER NOT NULL,
    run_at         INTEGER NOT NULL,
    attempt        INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    failures       INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    lost           INTEGER NOT NULL DEFAULT 0 CHECK (lost >= 0),
    max_retries    INTEGER NOT NULL,
    max_lost       INTEGER NOT NULL,
    arguments      TEXT    NOT NULL,
    arguments_blob TEXT,
    inputs         TEXT,
    batch          TEXT,
    batch_index    INTEGER,
    session        TEXT,
    worker         TEXT,
    claim_number   INTEGER,
    claimed_at     INTEGER,
    started_at     INTEGER,
    finished_at    INTEGER,
    created_at     INTEGER NOT NULL,
    updated_at     INTEGER NOT NULL,
    cancel_requested_at INTEGER,
    outcome        TEXT,
    exit_code      INTEGER,
    result         TEXT,
    result_blob    TEXT,
    error          TEXT,
    UNIQUE (namespace, id),
    CHECK (CASE state
        WHEN 'pending' THEN is_ready BETWEEN 0 AND 1 AND finished_at IS NULL
            AND (outcome IS NULL OR outcome IN ('failed', 'timed_out', 'lost', 'released'))
        WHEN 'claimed' THEN is_ready = 0 AND finished_at IS NULL AND outcome IS NULL
            AND attempt > 0 AND session IS NOT NULL AND claimed_at IS NOT NULL
        WHEN 'completed' THEN is_ready = 0 AND finished_at IS NOT NULL AND outcome IS 'completed'
        WHEN 'in_progress' THEN is_ready = 0 AND finished_at IS NULL AND outcome IS NULL
            AND attempt > 0 AND session IS NOT NULL AND claimed_at IS NOT NULL
        WHEN 'failed' THEN is_ready = 0 AND finished_at IS NOT NULL AND outcome IS NOT NULL AND outcome IN ('failed', 'timed_out', 'lost')
        WHEN 'cancelled' THEN is_ready = 0 AND finished_at IS NOT NULL AND outcome IS 'cancelled'
        WHEN 'blocked' THEN is_ready = 0 AND finished_at IS NULL AND outcome IS NULL
        ELSE 0
    END)
) STRICT;

-- An index ends with seq by itself.
-- The claim index: due jobs only, so that a claim is a seek into each class.
CREATE INDEX jobs_ready ON jobs (class_id, priority DESC, run_at) WHERE is_ready = 1;
-- Jobs whose time has not come, for the promoter.
CREATE INDEX jobs_waiting ON jobs (run_at) WHERE state = 'pending' AND is_ready = 0;
-- Leases, counted and found by session.
CREATE INDEX jobs_leased ON jobs (session, claim_number) WHERE state IN ('claimed', 'in_progress');
-- Cancels on their way to a worker.
CREATE INDEX jobs_cancelling ON jobs (session) WHERE cancel_requested_at IS NOT NULL AND state IN ('claimed', 'in_progress');
-- Listings by state, newest first, and of all states by a seek into each; leased jobs are listed through jobs_leased, so a claim and a completion touch this once each.
CREATE INDEX jobs_by_state ON jobs (namespace, state, created_at) WHERE state NOT IN ('claimed', 'in_progress');
-- Listings by name and tag go through the spec; the pruner asks it whether a spec is still used.
CREATE INDEX jobs_by_spec ON jobs (spec_id, created_at);
-- What retention may remove.
CREATE INDEX jobs_finished ON jobs (finished_at) WHERE finished_at IS NOT NULL;

CREATE TABLE class_counts (
    class_id INTEGER NOT NULL,
    state    TEXT    NOT NULL,
    n        INTEGER NOT NULL CHECK (n >= 0),
    PRIMARY KEY (class_id, state)
) STRICT, WITHOUT ROWID;

CREATE TABLE attempts (
    job         INTEGER NOT NULL,
    attempt     INTEGER NOT NULL,
    session     TEXT    NOT NULL,
    worker      TEXT    NOT NULL,
    claimed_at  INTEGER NOT NULL,
    started_at  INTEGER,
    finished_at INTEGER NOT NULL,
    outcome     TEXT    NOT NULL,
    exit_code   INTEGER,
    error       TEXT,
    PRIMARY KEY (job, attempt)
) STRICT, WITHOUT ROWID;

-- job is the number of a job: the event "submitted" tells its id, also when the job has been removed.
-- batch stands on the ends of a batch's jobs only, which is what those who wait for them read.
CREATE TABLE events (
    seq       INTEGER PRIMARY KEY,
    namespace TEXT    NOT NULL,
    job       INTEGER NOT NULL,
    type      TEXT    NOT NULL,
    attempt   INTEGER NOT NULL,
    at        INTEGER NOT NULL,
    worker    TEXT,
    batch     TEXT,
    job_id    TEXT,
    CHECK (type <> 'submitted' OR job_id IS NOT NULL)
) STRICT;

CREATE INDEX events_by_job ON events (job);
CREATE INDEX events_of_batch ON events (namespace, batch) WHERE batch IS NOT NULL;

CREATE TRIGGER jobs_submitted AFTER INSERT ON jobs BEGIN
    INSERT INTO events (namespace, job, type, attempt, at, job_id)
    VALUES (NEW.namespace, NEW.seq, 'submitted', 0, NEW.created_at, NEW.id);
    INSERT INTO class_counts (class_id, state, n) VALUES (NEW.class_id, NEW.state, 1)
    ON CONFLICT (class_id, state) DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER jobs_submitted_with_blobs AFTER INSERT ON jobs
WHEN NEW.arguments_blob IS NOT NULL OR NEW.inputs IS NOT NULL BEGIN
    INSERT INTO blob_refs (digest, namespace, owner)
    SELECT DISTINCT digest, NEW.namespace, 'job:' || NEW.id
    FROM (SELECT NEW.arguments_blob AS digest UNION SELECT value ->> '$.digest' FROM json_each(coalesce(NEW.inputs, '[]')))
    WHERE digest IS NOT NULL;
END;

CREATE TRIGGER jobs_result_blob AFTER UPDATE OF result_blob ON jobs
WHEN NEW.result_blob IS NOT NULL AND NEW.result_blob IS NOT OLD.result_blob BEGIN
    INSERT INTO blob_refs (digest, namespace, owner) VALUES (NEW.result_blob, NEW.namespace, 'job:' || NEW.id)
    ON CONFLICT DO NOTHING;
END;

CREATE TRIGGER jobs_changed AFTER UPDATE OF state ON jobs WHEN OLD.state <> NEW.state BEGIN
    UPDATE class_counts SET n = n - 1 WHERE class_id = OLD.class_id AND state = OLD.state;
    INSERT INTO class_counts (class_id, state, n) VALUES (NEW.class_id, NEW.state, 1)
    ON CONFLICT (class_id, state) DO UPDATE SET n = n + 1;
    INSERT INTO events (namespace, job, attempt, at, worker, batch, type, job_id)
    VALUES (
        NEW.namespace, NEW.seq, NEW.attempt, NEW.updated_at, NEW.worker, iif(NEW.finished_at IS NULL, NULL, NEW.batch),
        CASE
            WHEN NEW.state = 'in_progress' THEN 'started'
            WHEN NEW.state <> 'pending' THEN NEW.state
            WHEN OLD.state IN ('failed', 'cancelled') THEN 'reopened'
            WHEN OLD.state = 'blocked' THEN 'submitted'
            WHEN NEW.outcome IN ('released', 'lost') THEN NEW.outcome
            ELSE 'retried'
        END,
        iif(OLD.state = 'blocked', NEW.id, NULL)
    );
END;

CREATE TRIGGER jobs_attempt_ended AFTER UPDATE OF state ON jobs
WHEN OLD.state IN ('claimed', 'in_progress') AND NEW.state NOT IN ('claimed', 'in_progress') BEGIN
    INSERT INTO attempts (job, attempt, session, worker, claimed_at, started_at, finished_at, outcome, exit_code, error)
    VALUES (
        NEW.seq, NEW.attempt, NEW.session, NEW.worker, NEW.claimed_at, NEW.started_at,
        coalesce(NEW.finished_at, NEW.updated_at), NEW.outcome, NEW.exit_code, NEW.error
    );
END;

CREATE TRIGGER jobs_cancel_requested AFTER UPDATE OF cancel_requested_at ON jobs
WHEN OLD.cancel_requested_at IS NULL AND NEW.cancel_requested_at IS NOT NULL AND NEW.state IN ('claimed', 'in_progress') BEGIN
    INSERT INTO events (namespace, job, type, attempt, at, worker)
    VALUES (NEW.namespace, NEW.seq, 'cancel_requested', NEW.attempt, NEW.updated_at, NEW.worker);
END;

CREATE TRIGGER jobs_removed AFTER DELETE ON jobs BEGIN
    UPDATE class_counts SET n = n - 1 WHERE class_id = OLD.class_id AND state = OLD.state;
    DELETE FROM attempts WHERE job = OLD.seq;
END;

CREATE TRIGGER jobs_removed_with_blobs AFTER DELETE ON jobs
WHEN OLD.arguments_blob IS NOT NULL OR OLD.inputs IS NOT NULL OR OLD.result_blob IS NOT NULL BEGIN
    DELETE FROM blob_refs WHERE namespace = OLD.namespace AND owner = 'job:' || OLD.id;
END;

CREATE TABLE batches (
    namespace  TEXT    NOT NULL,
    id         TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    identity   TEXT    NOT NULL,
    generation INTEGER NOT NULL,
    total      INTEGER NOT NULL CHECK (total >= 0),
    created_at INTEGER NOT NULL,
    PRIMARY KEY (namespace, id),
    UNIQUE (namespace, identity, generation)
) STRICT, WITHOUT ROWID;

CREATE INDEX batches_by_name ON batches (namespace, name, created_at);

-- Jobs of a batch by state, kept by triggers, so that progress costs nothing to ask for.
CREATE TABLE batch_counts (
    namespace TEXT    NOT NULL,
    batch     TEXT    NOT NULL,
    state     TEXT    NOT NULL,
    n         INTEGER NOT NULL CHECK (n >= 0),
    PRIMARY KEY (namespace, batch, state)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER jobs_batch_submitted AFTER INSERT ON jobs WHEN NEW.batch IS NOT NULL BEGIN
    INSERT INTO batch_counts (namespace, batch, state, n) VALUES (NEW.namespace, NEW.batch, NEW.state, 1)
    ON CONFLICT (namespace, batch, state) DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER jobs_batch_changed AFTER UPDATE OF state ON jobs WHEN NEW.batch IS NOT NULL AND OLD.state <> NEW.state BEGIN
    UPDATE batch_counts SET n = n - 1 WHERE namespace = OLD.namespace AND batch = OLD.batch AND state = OLD.state;
    INSERT INTO batch_counts (namespace, batch, state, n) VALUES (NEW.namespace, NEW.batch, NEW.state, 1)
    ON CONFLICT (namespace, batch, state) DO UPDATE SET n = n + 1;
END;

CREATE TRIGGER jobs_batch_removed AFTER DELETE ON jobs WHEN OLD.batch IS NOT NULL BEGIN
    UPDATE batch_counts SET n = n - 1 WHERE namespace = OLD.namespace AND batch = OLD.batch AND state = OLD.state;
END;

CREATE TRIGGER batches_removed AFTER DELETE ON batches BEGIN
    DELETE FROM batch_counts WHERE namespace = OLD.namespace AND batch = OLD.id;
END;

CREATE TABLE sessions (
    id            TEXT    PRIMARY KEY,
    namespace     TEXT    NOT NULL,
    name          TEXT    NOT NULL,
    offer         TEXT    NOT NULL,
    state         TEXT    NOT NULL CHECK (state IN ('online', 'draining', 'dead', 'closed')),
    host          TEXT    NOT NULL,
    pid           INTEGER NOT NULL,
    interpreter   TEXT    NOT NULL,
    renewals      INTEGER NOT NULL DEFAULT 0,
    last_number   INTEGER NOT NULL DEFAULT 0,
    registered_at INTEGER NOT NULL,
    seen_at       INTEGER NOT NULL,
    ended_at      INTEGER,
    CHECK ((state IN ('dead', 'closed')) = (ended_at IS NOT NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX sessions_live ON sessions (namespace, id) WHERE state IN ('online', 'draining');
CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE tokens (
    id           TEXT    PRIMARY KEY,
    namespace    TEXT    NOT NULL,
    name         TEXT    NOT NULL,
    hash         TEXT    NOT NULL UNIQUE,
    scopes       TEXT    NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER,
    revoked_at   INTEGER,
    last_used_at INTEGER
) STRICT, WITHOUT ROWID;
