-- The columns of a table, for column_types.sql.
--
-- $1: the table's name, quoted.
SELECT a.attnum AS at, a.attname::pg_catalog.text AS name, a.atttypid AS oid
FROM pg_catalog.pg_attribute AS a
WHERE a.attrelid OPERATOR(pg_catalog.=) $1::pg_catalog.text::pg_catalog.regclass
    AND a.attnum OPERATOR(pg_catalog.>) 0
    AND NOT a.attisdropped
