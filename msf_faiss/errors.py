"""The one exception that stands for a mistake of the user rather than of the program."""


class UserError(ValueError):
    """Something the user can put right: a path, a setting, a full disk, a damaged file.

    Its text says what is wrong, where, and what to do. The command line prints that text alone and exits with 2; any
    other exception is a bug, which exits with 1 and a traceback.
    """
