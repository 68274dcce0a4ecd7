-- A statement's parameters, for column_types.sql.
--
-- $1: the types' numbers, as an array is written in text.
SELECT p.at, ''::pg_catalog.text AS name, p.oid
FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text::pg_catalog.oid[])) WITH ORDINALITY AS p (oid, at)
