-- A part of an exception handler: an error that is no row's fault ends the call.
IF (
  SQLSTATE OPERATOR(pg_catalog.=) ANY (d_stop)
  OR pg_catalog.substr(SQLSTATE, 1, 2) OPERATOR(pg_catalog.=) ANY (d_stop)
) AND NOT SQLSTATE OPERATOR(pg_catalog.=) ANY (d_keep) THEN
  RAISE;
END IF;
