-- A part of a function's body: raise where a table's columns are not of these types any more. A text that is cast
-- to the old type may be changed by it. (The table was altered, or the batch runs on another database now.)
--
-- The code is one of the data's, so that it counts for these rows only, and the function is made anew for the next.
--
-- relation: the table, quoted, as a string literal. same: a condition on d_a that is true of each column that is
-- as it was. number: how many columns there are.
IF (
  SELECT pg_catalog.count(*)
  FROM pg_catalog.pg_attribute AS d_a
  WHERE NOT d_a.attisdropped
    AND d_a.attrelid OPERATOR(pg_catalog.=) {relation}::pg_catalog.regclass
    AND ({same})
) OPERATOR(pg_catalog.<>) {number} THEN
  RAISE SQLSTATE '22000';
END IF;
