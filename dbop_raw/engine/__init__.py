"""Capacity: who gets a connection, one call's road to COMMIT, a COMMIT in doubt, the numbers."""
