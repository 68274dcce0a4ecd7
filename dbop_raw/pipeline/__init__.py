"""Operations and what wraps them: `operation`, `pipe`, `timeout`, `retry`, `savepoint`."""
