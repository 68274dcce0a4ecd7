"""The ways to write items, a module each, and what they share.

A writer writes one span, or raises and says which item it was. It knows nothing of savepoints, retries or the
search for bad items: the batch calls it for the spans that the chooser names.

What the batch and a writer say to each other stands in `protocol.py`, what the writers of rows share in
`rows.py`, what both COPY writers share in `copying.py`.
"""
