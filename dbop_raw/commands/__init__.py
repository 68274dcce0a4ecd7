"""What the console command `dbop-raw` does: one module a command, and what they share."""
