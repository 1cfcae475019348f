"""Everything that stands between a person and a stream: the command line, later engine and server.

cli.py   `streamgen COMMAND`; imports torch, and training, only inside the command that needs them
"""
