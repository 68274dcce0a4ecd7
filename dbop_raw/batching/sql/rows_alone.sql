-- The body of a function that tries one row after another: best where many are bad. Each costs an internal
-- subtransaction (PL/pgSQL, "Trapping Errors").
--
-- A loop over records, since a subscript for each value would cost more, and the more the further back it is.
--
-- guard: what columns_unchanged.sql gives, or nothing. arrays: all arguments unnested. names: c1, c2, …, the names
-- of their columns. write_row: the statement that writes d_row. stop_or_go_on, read_error: the files of that name.
#variable_conflict use_column
DECLARE
  d_row pg_catalog.record;
BEGIN
  {guard}
  FOR d_row IN SELECT d_rows.* FROM ROWS FROM ({arrays}) WITH ORDINALITY AS d_rows({names}, d_at) LOOP
    BEGIN
      {write_row};
    EXCEPTION WHEN OTHERS THEN
      {stop_or_go_on}
      {read_error}
      d_index := d_row.d_at;
      RETURN NEXT;
    END;
  END LOOP;
END
