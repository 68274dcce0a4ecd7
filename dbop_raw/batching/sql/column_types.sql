-- The columns of a table, each with its type as the functions in pg_temp need it.
--
-- $1: the table's name, quoted.
--
-- `type` is the type as SQL writes it, of a domain the base type, and without a length. With -1 for the length
-- format_type says bpchar, where it would else say character, of which one is meant.
WITH RECURSIVE c AS (
    SELECT a.attname AS name, a.atttypid AS oid, a.atttypid AS base
    FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid OPERATOR(pg_catalog.=) $1::pg_catalog.text::pg_catalog.regclass
        AND a.attnum OPERATOR(pg_catalog.>) 0
        AND NOT a.attisdropped
    UNION ALL
    SELECT c.name, c.oid, t.typbasetype
    FROM c
    JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) c.base
    WHERE t.typtype OPERATOR(pg_catalog.=) 'd'
)
SELECT
    c.name::pg_catalog.text AS name,
    pg_catalog.format_type(c.base, -1) AS type,
    c.oid,
    t.typlen OPERATOR(pg_catalog.=) -1 AND t.typelem OPERATOR(pg_catalog.<>) 0 AS is_array
FROM c
JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) c.base
WHERE t.typtype OPERATOR(pg_catalog.<>) 'd'
