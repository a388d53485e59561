"""The one exception that a reader may see as a plain sentence."""


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected, and how to fix it.

    The command line prints it without a traceback and ends with exit code 2.
    """
