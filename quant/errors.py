"""Every mistake a user can make, each with its exit code and what to do next.

An error says three things in plain words: what happened, why, and what to type next.
The command line prints them without a traceback (`--debug` shows it).
Exit codes follow BSD's sysexits.h, so that scripts can tell a bad file from a full disk.
"""


class QwqQuantError(Exception):
    """A failure with a message for the user: what happened, why, and what to do next."""

    exit_code = 70

    def __init__(self, what: str, why: str = "", next_step: str = ""):
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.next_step) if line)


class UsageError(QwqQuantError):
    """Options that contradict each other or cannot be understood."""

    exit_code = 2


class BadInput(QwqQuantError):
    """A file is there but is not what it should be: damaged, hostile or unsupported."""

    exit_code = 65


class InputMissing(QwqQuantError):
    """A file, folder or repository that was named does not exist."""

    exit_code = 66


class Unavailable(QwqQuantError):
    """A library, the hub, or enough memory is not to be had here."""

    exit_code = 69


class CannotCreate(QwqQuantError):
    """The output exists already, is locked by another run, or its folder cannot be written."""

    exit_code = 73


class OutputFailed(QwqQuantError):
    """Writing failed: disk full, quota, input/output error, or read-back differs."""

    exit_code = 74


class NotPermitted(QwqQuantError):
    """Access denied: file permissions, or a gated repository."""

    exit_code = 77


class BadRecipe(QwqQuantError):
    """A recipe, profile or override says something that cannot be done."""

    exit_code = 78
