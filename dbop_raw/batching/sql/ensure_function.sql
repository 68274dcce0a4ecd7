-- Make a function in pg_temp where the session has none of that name. An earlier batch may have made it; or its
-- transaction was rolled back; or a pooler gave us another session. To make it again each time would fill
-- pg_proc with dead rows.
--
-- name: the function's. create: what makes it, as a string literal. tag: a dollar quote.
DO {tag}
BEGIN
  IF pg_catalog.to_regproc('pg_temp.{name}') IS NULL THEN
    EXECUTE {create};
  END IF;
END
{tag}
