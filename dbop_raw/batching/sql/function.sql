-- A function in pg_temp that tries rows, given as arrays, and returns the errors of those that fail.
--
-- d_block: how many rows are tried together at first. d_stop: the codes and classes of errors that are no row's
-- fault and end the call. d_keep: the codes in such a class that are a row's fault all the same. d_count: how many
-- rows there are.
-- d_index: the row's place, from 1. The other columns are the fields of its error that PL/pgSQL can read; not its
-- context, which would tell of this function. Where rows were dropped on their way, by a trigger, one more row of
-- the result says how many: as a number below 0 in d_index.
--
-- No argument is of a type of the user's: PostgreSQL would not let it be dropped as long as the session lives.
--
-- name: the function's. arguments: the arrays, `d_1 text[], d_2 integer[]`. body: what rows_alone.sql or
-- rows_in_blocks.sql gives. tag: a dollar quote.
--
-- All variables begin with d_; a column of the user's that is named alike wins.
CREATE FUNCTION pg_temp.{name}(
  d_block pg_catalog.int4, d_stop pg_catalog.text[], d_keep pg_catalog.text[], d_count pg_catalog.int4, {arguments}
)
RETURNS TABLE (
  d_index pg_catalog.int4,
  d_code pg_catalog.text,
  d_message pg_catalog.text,
  d_detail pg_catalog.text,
  d_hint pg_catalog.text,
  d_schema pg_catalog.text,
  d_table pg_catalog.text,
  d_column pg_catalog.text,
  d_datatype pg_catalog.text,
  d_constraint pg_catalog.text
)
LANGUAGE plpgsql AS {tag}
{body}
{tag}
