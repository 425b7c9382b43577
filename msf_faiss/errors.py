"""The exceptions that stand for something other than a mistake in the program, and what they mean to a shell."""

EXIT_RESTART = 75
"""Exit code of what ended early through no fault of its own: the same command continues (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """Something the user can put right: a path, a setting, a full disk, a damaged file.

    Its text says what is wrong, where, and what to do. The command line prints that text alone and exits with 2; any
    other exception is a bug, which exits with 1 and a traceback.
    """


class RestartError(UserError):
    """Nothing is wrong here, but the run cannot go on: the same command may well. The command line exits with 75."""


class PeerError(UserError):
    """Rank 0 made a mistake of the user's, and tells it."""
