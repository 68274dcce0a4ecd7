"""The command `dbop-raw`: one file a command."""
