"""The console command `dbop-raw`: a file for each command, and what they share."""
