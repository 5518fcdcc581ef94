-- name: add_token
-- Store a token by the hash of its secret.
INSERT INTO tokens (id, namespace, name, hash, scopes, created_at, expires_at)
VALUES (:id, :namespace, :name, :hash, :scopes, :now, :expires_at)
RETURNING id;

-- name: find_token_by_hash
-- The token of a presented secret.
-- quick
SELECT id, namespace, name, hash, scopes, created_at, expires_at, revoked_at, last_used_at FROM tokens WHERE hash = :hash;

-- name: list_tokens
-- Tokens, newest first.
SELECT id, namespace, name, hash, scopes, created_at, expires_at, revoked_at, last_used_at
FROM tokens WHERE namespace = :namespace ORDER BY id DESC LIMIT :limit;

-- name: revoke_token
-- Make a token worthless, for good.
UPDATE tokens SET revoked_at = coalesce(revoked_at, :now) WHERE id = :id AND namespace = :namespace
RETURNING id, namespace, name, hash, scopes, created_at, expires_at, revoked_at, last_used_at;

-- name: use_token
-- Note that a token was used.
UPDATE tokens SET last_used_at = :now WHERE id = :id RETURNING id;

-- name: has_token
-- Is there a token that still counts?
SELECT EXISTS (SELECT 1 FROM tokens WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > :now));
