"""What went wrong and who can repair it: our errors, the table of SQLSTATEs, verdicts, retry policies."""
