"""A stream of items in as many transactions as it takes: reader, chunks, ledger, rejects, report."""
