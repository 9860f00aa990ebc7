"""The one exception a user is meant to see."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, what was expected, what to do.

    `common.cli.main` turns it into that line on stderr and exit code 2; inside Python it is an ordinary exception.
    """
