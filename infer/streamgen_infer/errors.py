"""The counterpart of `streamgen.errors.UserError` for what is nobody's mistake."""


class Failure(Exception):
    """Something outside failed (a disk, a pipe) and one line says all: exit code 1, no traceback, no type."""
