"""How large a pool: advice from an engine's own numbers, and a load test with its model and its pictures."""
