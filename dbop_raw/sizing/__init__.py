"""How large a pool: advice from an engine's own numbers."""
