"""What went wrong, and who can repair it: errors, the table of SQLSTATEs, verdicts, retry policies."""
