-- A part of a function's body, at its end: say how many rows were dropped on their way.
IF d_dropped OPERATOR(pg_catalog.>) 0 THEN
  d_index := OPERATOR(pg_catalog.-) d_dropped;
  d_code := NULL;
  RETURN NEXT;
END IF;
