-- The body of a function that tries blocks of rows: best where few are bad, and then no slower than a span.
--
-- A block that fails is tried again in smaller ones, at last row by row. d_good_in_a_row counts the good rows since
-- the last bad one: where they get many, blocks are tried again.
--
-- guard: what table_unchanged.sql gives. write_row: the statement that writes the row at d_first.
-- write_block: the one that writes d_first to d_last. stop_or_go_on, read_error, read_dropped: the files of that name.
#variable_conflict use_column
DECLARE
  d_first pg_catalog.int4 := 1;
  d_last pg_catalog.int4;
  d_written pg_catalog.int4;
  d_dropped pg_catalog.int4 := 0;
  d_good_in_a_row pg_catalog.int4 := 0;
BEGIN
  {guard}
  WHILE d_first OPERATOR(pg_catalog.<=) d_count LOOP
    d_last := LEAST(d_first OPERATOR(pg_catalog.+) d_block OPERATOR(pg_catalog.-) 1, d_count);
    BEGIN
      IF d_last OPERATOR(pg_catalog.=) d_first THEN
        {write_row};
      ELSE
        {write_block};
      END IF;
      GET DIAGNOSTICS d_written = ROW_COUNT;
      d_dropped := d_dropped OPERATOR(pg_catalog.+) d_last OPERATOR(pg_catalog.-) d_first
        OPERATOR(pg_catalog.+) 1 OPERATOR(pg_catalog.-) d_written;
      d_good_in_a_row := d_good_in_a_row OPERATOR(pg_catalog.+) d_last OPERATOR(pg_catalog.-) d_first
        OPERATOR(pg_catalog.+) 1;
      d_first := d_last OPERATOR(pg_catalog.+) 1;
      IF d_block OPERATOR(pg_catalog.>) 1 THEN
        d_block := LEAST(d_block OPERATOR(pg_catalog.*) 2, 512);
      ELSIF d_good_in_a_row OPERATOR(pg_catalog.>=) 24 THEN
        d_block := 8;
      END IF;
    EXCEPTION WHEN OTHERS THEN
      {stop_or_go_on}
      IF d_last OPERATOR(pg_catalog.=) d_first THEN
        {read_error}
        d_index := d_first;
        RETURN NEXT;
        d_first := d_first OPERATOR(pg_catalog.+) 1;
        d_block := 1;
        d_good_in_a_row := 0;
      ELSE
        d_block := d_block OPERATOR(pg_catalog./) 4;
        IF d_block OPERATOR(pg_catalog.<) 1 THEN
          d_block := 1;
        END IF;
      END IF;
    END;
  END LOOP;
  {read_dropped}
END
