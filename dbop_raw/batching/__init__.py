"""Resilience: one transaction, many items, bad ones set aside."""
