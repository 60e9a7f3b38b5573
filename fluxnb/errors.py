"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can put right.

    The message is one sentence: what is wrong, what is allowed, what to do. The command line prints it
    without a traceback and exits with status 2.
    """
