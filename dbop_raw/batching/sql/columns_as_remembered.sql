-- Raise 2201G, which nothing else in such a message raises, where a table's columns are not of the types that the
-- driver remembers. COPY in binary would take a value's bits for another value.
--
-- 2201G is what a histogram of no buckets gives: the plainest expression that raises, and only when it is executed.
--
-- relation: the table, quoted, as a string literal. known: an array as a string literal, of each column's name and
-- its type's number with a space between; where that may be one of several, each of them. number: how many columns
-- there are.
SELECT pg_catalog.width_bucket(
  0::pg_catalog.float8,
  0::pg_catalog.float8,
  1::pg_catalog.float8,
  CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) {number} THEN 1 ELSE 0 END
)
FROM pg_catalog.pg_attribute AS d_a
WHERE NOT d_a.attisdropped
  AND d_a.attrelid OPERATOR(pg_catalog.=) pg_catalog.to_regclass({relation})
  AND pg_catalog.concat(d_a.attname, ' ', d_a.atttypid) OPERATOR(pg_catalog.=) ANY ({known}::pg_catalog.text[])
