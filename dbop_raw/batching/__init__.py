"""Resilience: one transaction, many items, bad ones set aside.

- `batch.py` drives: it sends spans of items behind savepoints, and follows what is decided;
- `spans.py` decides which span is next, by the prices that `costs.py` has measured;
- `judging.py` decides what a failed span means, and when constraints are checked;
- `writers/` write a span, each in its way; `result.py` is what comes back;
- `inserver.py` has the server try rows one by one, with functions that `server_functions.py` makes of the
  templates in `sql/`; `suspects.py` says which rows will most likely be refused.
"""
