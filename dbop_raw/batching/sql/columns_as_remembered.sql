-- Raise 2201G, which nothing else in such a message raises, where a table's columns are not of the types that the
-- driver remembers. COPY in binary would take a value's bits for another value.
--
-- 2201G is what a histogram of no buckets gives: the plainest expression that raises, and only when it is executed.
--
-- relation: the table, quoted, as a string literal. same: a condition on d_a that is true of each column that is
-- as it was. number: how many columns there are.
SELECT pg_catalog.width_bucket(
  0::pg_catalog.float8,
  0::pg_catalog.float8,
  1::pg_catalog.float8,
  CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) {number} THEN 1 ELSE 0 END
)
FROM pg_catalog.pg_attribute AS d_a
WHERE NOT d_a.attisdropped
  AND d_a.attrelid OPERATOR(pg_catalog.=) pg_catalog.to_regclass({relation})
  AND ({same})
