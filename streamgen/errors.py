"""The one exception for mistakes of the person who called."""


class UserError(ValueError):
    """What was wrong, what is allowed and what to do, in one line.

    The command line prints the message alone (no traceback) and exits with status 2.
    """
