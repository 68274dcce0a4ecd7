-- The domains among the types of a table's columns, each with the types below it. As numbers only, which go through
-- no codec of the user's.
--
-- relation: the table, quoted, as a string literal.
WITH RECURSIVE c AS (
    SELECT a.atttypid AS own, a.atttypid AS base
    FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid OPERATOR(pg_catalog.=) pg_catalog.to_regclass({relation})
        AND a.attnum OPERATOR(pg_catalog.>) 0
        AND NOT a.attisdropped
    UNION ALL
    SELECT c.own, t.typbasetype
    FROM c
    JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) c.base
    WHERE t.typtype OPERATOR(pg_catalog.=) 'd'
)
SELECT c.base, c.own
FROM c
WHERE c.base OPERATOR(pg_catalog.<>) c.own
