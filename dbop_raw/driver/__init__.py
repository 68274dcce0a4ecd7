"""The seam to asyncpg: connections, control SQL as text, commands under way, DSNs."""
