"""Observers that come with dbop_raw, a module each.

They are not imported here, because each may need a package that another does without: import the module, for
example `from dbop_raw.observe.structlog import StructlogObserver`.
"""
