"""Benchmarks, each beside its baseline: `python -m bench --help`."""
