-- name: health_read
-- Can the store be read?
-- quick
SELECT EXISTS (SELECT 1 FROM sessions WHERE id = '');

-- name: health_write
-- Can the store be written? Takes the write lock and changes no row.
UPDATE sessions SET renewals = renewals WHERE id = '' RETURNING id;
