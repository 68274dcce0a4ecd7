-- The types of a table's columns, or of a statement's parameters, as the functions in pg_temp need them.
--
-- source: gives `at`, `name` and the type's `oid` of each; what stands in its $1 is said there.
--
-- `base` is the type itself; of a domain, the one below it. `type` is how SQL writes it, without a length: with -1
-- for the length format_type says bpchar, where it would else say character, of which one is meant.
-- `casts_otherwise` is true where a cast from text is a function, and may give another value than the type's own
-- input function. (Those of the server itself that give the same are left out.)
WITH RECURSIVE s AS (
    {source}
),
c AS (
    SELECT s.at, s.name, s.oid, s.oid AS base
    FROM s
    UNION ALL
    SELECT c.at, c.name, c.oid, t.typbasetype
    FROM c
    JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) c.base
    WHERE t.typtype OPERATOR(pg_catalog.=) 'd'
)
SELECT
    c.name,
    c.oid,
    t.oid AS base,
    pg_catalog.format_type(t.oid, -1) AS type,
    t.typtype::pg_catalog.text AS kind,
    t.typlen OPERATOR(pg_catalog.=) -1 AND t.typelem OPERATOR(pg_catalog.<>) 0 AS is_array,
    EXISTS (
        SELECT FROM pg_catalog.pg_cast AS k
        WHERE k.castsource OPERATOR(pg_catalog.=) 'pg_catalog.text'::pg_catalog.regtype
            AND k.casttarget OPERATOR(pg_catalog.=) t.oid
            AND k.castmethod OPERATOR(pg_catalog.=) 'f'
            AND k.casttarget OPERATOR(pg_catalog.<>) 'pg_catalog."char"'::pg_catalog.regtype
            AND k.casttarget OPERATOR(pg_catalog.<>) 'pg_catalog.name'::pg_catalog.regtype
            AND k.casttarget OPERATOR(pg_catalog.<>) 'pg_catalog.xml'::pg_catalog.regtype
    ) AS casts_otherwise
FROM c
JOIN pg_catalog.pg_type AS t ON t.oid OPERATOR(pg_catalog.=) c.base
WHERE t.typtype OPERATOR(pg_catalog.<>) 'd'
ORDER BY c.at
