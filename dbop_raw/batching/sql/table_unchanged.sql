-- A part of a function's body: raise where INSERT would not do what COPY does, or the table's columns are not of
-- these types any more. (The table was altered, or the batch runs on another database now.)
--
-- COPY fires no rules, INSERT does; a view is written to by rules or triggers; COPY refuses a table whose row
-- security is in force. And a value that was cast to a column's old type may have been changed by it.
--
-- The code is one of the data's, so that it counts for these rows only, and the function is made anew for the next.
--
-- relation: the table, quoted, as a string literal. same: a condition on d_a that is true of each column that is
-- as it was. number: how many columns there are.
IF pg_catalog.row_security_active({relation}::pg_catalog.regclass) OR EXISTS (
  SELECT FROM pg_catalog.pg_class AS d_c
  WHERE d_c.oid OPERATOR(pg_catalog.=) {relation}::pg_catalog.regclass
    AND (d_c.relhasrules OR d_c.relkind OPERATOR(pg_catalog.=) 'v')
) OR (
  SELECT pg_catalog.count(*)
  FROM pg_catalog.pg_attribute AS d_a
  WHERE NOT d_a.attisdropped
    AND d_a.attrelid OPERATOR(pg_catalog.=) {relation}::pg_catalog.regclass
    AND ({same})
) OPERATOR(pg_catalog.<>) {number} THEN
  RAISE SQLSTATE '22000';
END IF;
