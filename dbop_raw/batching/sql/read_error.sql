-- A part of an exception handler: read the error's fields into what the function returns.
GET STACKED DIAGNOSTICS
  d_code = RETURNED_SQLSTATE,
  d_message = MESSAGE_TEXT,
  d_detail = PG_EXCEPTION_DETAIL,
  d_hint = PG_EXCEPTION_HINT,
  d_schema = SCHEMA_NAME,
  d_table = TABLE_NAME,
  d_column = COLUMN_NAME,
  d_datatype = PG_DATATYPE_NAME,
  d_constraint = CONSTRAINT_NAME;
