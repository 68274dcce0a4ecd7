"""The SQL of batches that is longer than a line: a `.sql` file each, where an editor can read it.

Each file begins with comments that say what it is and what stands in its braces: templates are filled by
`str.format`. Nothing in them is looked up by an unqualified name, operators neither, so that no `search_path`
can put something else in its place. (What the parser itself knows needs no name: `NOT`, `AND`, `LEAST`,
`COALESCE`, `ANY`.)
"""

from __future__ import annotations

import functools
from importlib import resources

__all__ = ["read"]


@functools.cache
def read(name: str) -> str:
    """Return the SQL of the file `name`.sql, read once.

    Without its comments: they are for the reader, and the text travels to the server.
    """
    text = resources.files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
