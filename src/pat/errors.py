"""Errors raised on purpose. Every message says what was given, what was expected and what to do."""


class PatError(Exception):
    """Root of every error PAT raises on purpose; by itself it means that the user's input is wrong."""

    exit_status = 2


class RunFailed(PatError):
    """The input was fine, but the run could not be completed (non-finite loss, parity out of tolerance)."""

    exit_status = 1


class Interrupted(RunFailed):
    """A signal has ended a run after its step; the same command goes on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class Diverged(RunFailed):
    """Training came to infinite or undefined numbers."""


class ParityMissed(RunFailed):
    """Two forms of a model that ought to be the same function differ by more than rounding."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
