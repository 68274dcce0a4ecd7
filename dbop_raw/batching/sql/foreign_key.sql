-- What a foreign key's columns are, the columns that they refer to, each in the constraint's order, and whether
-- it refers to its own table. There a row may be refused for what comes after it, and its value be good the next
-- time. (An error names a partition, whose foreign key refers to the table above it.)
--
-- $1, $2, $3: the names of schema, table and constraint, as an error gives them.
SELECT
    (
        SELECT pg_catalog.array_agg(a.attname::pg_catalog.text ORDER BY k.place)
        FROM pg_catalog.unnest(c.conkey) WITH ORDINALITY AS k(attnum, place)
        JOIN pg_catalog.pg_attribute AS a
            ON a.attrelid OPERATOR(pg_catalog.=) c.conrelid AND a.attnum OPERATOR(pg_catalog.=) k.attnum
    ) AS columns,
    (
        SELECT pg_catalog.array_agg(a.attname::pg_catalog.text ORDER BY k.place)
        FROM pg_catalog.unnest(c.confkey) WITH ORDINALITY AS k(attnum, place)
        JOIN pg_catalog.pg_attribute AS a
            ON a.attrelid OPERATOR(pg_catalog.=) c.confrelid AND a.attnum OPERATOR(pg_catalog.=) k.attnum
    ) AS referenced,
    COALESCE(pg_catalog.pg_partition_root(c.conrelid), c.conrelid::pg_catalog.regclass)
        OPERATOR(pg_catalog.=)
        COALESCE(pg_catalog.pg_partition_root(c.confrelid), c.confrelid::pg_catalog.regclass) AS to_itself
FROM pg_catalog.pg_constraint AS c
JOIN pg_catalog.pg_class AS t ON t.oid OPERATOR(pg_catalog.=) c.conrelid
JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) t.relnamespace
WHERE n.nspname OPERATOR(pg_catalog.=) $1
    AND t.relname OPERATOR(pg_catalog.=) $2
    AND c.conname OPERATOR(pg_catalog.=) $3
    AND c.contype OPERATOR(pg_catalog.=) 'f'
