"""Errors that are not bugs, and their exit codes."""

EXIT_RESTART = 75
"""Exit code of a run that ended early and resumes when the same command is run again (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """Something the user can correct: a path, a setting, a full disk, a damaged file.

    The message says what is wrong, where, and what to do. The command line prints it without a traceback and exits with
    2; any other exception is a bug, printed with its traceback, exit code 1.
    """


class RestartError(UserError):
    """The run cannot continue in this process, but the same command can resume it. Exit code 75."""


class PeerError(UserError):
    """Another rank already reported this error."""
