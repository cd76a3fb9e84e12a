"""The one family of errors that a user is meant to read."""

from __future__ import annotations


class EmscanError(Exception):
    """Something kept emscan from auditing: what and why in ``message``, what to do in ``hint``.

    The command line prints ``message`` and ``hint`` as one line on stderr and exits 2. ``traceback``: of the user's own
    code, where that is what failed; it is printed before.
    """

    traceback: str = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return message and hint as one line."""
        text = f"{self.message}; {self.hint}" if self.hint else self.message
        return " ".join(text.split())


class LoadError(EmscanError):
    """The model file is unreadable, malformed, unsafe or of no known format."""


class ProbeError(EmscanError):
    """The probe is unreadable or does not fit the model."""


class ReportError(EmscanError):
    """A saved report is unreadable, malformed or of another schema version."""


class UsageError(EmscanError):
    """The options contradict each other or name something that does not exist."""


class ModelError(EmscanError):
    """The model's own code raised while it was built or run."""
