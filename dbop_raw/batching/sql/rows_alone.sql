-- The body of a function that tries one row after another: best where many are bad. Each costs an internal
-- subtransaction (PL/pgSQL, "Trapping Errors").
--
-- A loop over records, since a subscript for each value would cost more, and the more the further back it is.
--
-- guard: what table_unchanged.sql gives, or nothing. arrays: all columns unnested. names: c1, c2, …, the names
-- of their columns. write_row: the statement that writes d_row. count_row: what counts it where it was dropped.
-- stop_or_go_on, read_error, read_dropped: the files of that name.
#variable_conflict use_column
DECLARE
  d_row pg_catalog.record;
  d_dropped pg_catalog.int4 := 0;
BEGIN
  {guard}
  FOR d_row IN SELECT d_rows.* FROM ROWS FROM ({arrays}) WITH ORDINALITY AS d_rows({names}, d_at) LOOP
    BEGIN
      {write_row};
      {count_row}
    EXCEPTION WHEN OTHERS THEN
      {stop_or_go_on}
      {read_error}
      d_index := d_row.d_at;
      RETURN NEXT;
    END;
  END LOOP;
  {read_dropped}
END
