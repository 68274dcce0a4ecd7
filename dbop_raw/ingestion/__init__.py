"""A stream of items in as many transactions as it takes: chunks, ledger, rejects."""
