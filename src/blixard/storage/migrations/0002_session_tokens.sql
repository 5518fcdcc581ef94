-- phase: before
-- The token that registered a session ('': none was needed): only it may speak for the session.
ALTER TABLE sessions ADD COLUMN token TEXT NOT NULL DEFAULT '';
