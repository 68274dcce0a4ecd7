-- The columns of a foreign key; NULL where it refers to its own table. There a row may be refused for what
-- comes after it, and its value be good the next time.
--
-- $1, $2, $3: the names of schema, table and constraint, as an error gives them.
SELECT pg_catalog.array_agg(a.attname::pg_catalog.text)
FROM pg_catalog.pg_constraint AS c
JOIN pg_catalog.pg_class AS t ON t.oid OPERATOR(pg_catalog.=) c.conrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) t.relnamespace
JOIN pg_catalog.pg_attribute AS a
    ON a.attrelid OPERATOR(pg_catalog.=) c.conrelid AND a.attnum OPERATOR(pg_catalog.=) ANY (c.conkey)
WHERE n.nspname OPERATOR(pg_catalog.=) $1
    AND t.relname OPERATOR(pg_catalog.=) $2
    AND c.conname OPERATOR(pg_catalog.=) $3
    AND c.confrelid OPERATOR(pg_catalog.<>) c.conrelid
