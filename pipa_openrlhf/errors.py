"""The one exception that a command line turns into one readable line."""


class UserError(Exception):
    """Something the user can put right: a flag, a path, a line of data.

    The message is one line that says what is wrong, where, and what to do.
    """
