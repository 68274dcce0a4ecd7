"""Consistency: one transaction on one connection, and the scope in which operations run."""
