"""Models as files: convert, pull, record and replay, and whether one fits on this machine."""
