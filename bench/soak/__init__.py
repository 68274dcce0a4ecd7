"""A mixed load under faults: `python -m bench.soak --help`.

`books` keeps account of what must be in the table, `load` is what is run, `trouble` is what goes wrong. The
tests of `tests/faults` use the same three.
"""
