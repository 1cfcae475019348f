"""`streamgen live`: a stream in the terminal, changed while it plays. Start with command.py."""
