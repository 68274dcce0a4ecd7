"""The seam to asyncpg: connections, control SQL as text, commands that have started, DSNs."""
