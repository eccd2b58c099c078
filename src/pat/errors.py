"""Errors raised on purpose. Every message says what was given, what was expected and what to do."""

from __future__ import annotations

MAX_MESSAGE = 1500
"""Letters of a message; what it repeats of a file or an option may be as long as it likes."""


class PatError(ValueError):
    """Root of every error PAT raises on purpose; by itself it means that the user's input is wrong.

    It is a ValueError because that is what peft and transformers promise in their methods that PAT overrides
    (docs/adr/0027). Its message is one line without control characters, whatever names and values it repeats.
    """

    exit_status = 2

    def __init__(self, message: str, *, of_row: bool = False) -> None:
        """Make the error; `of_row` says that a row cannot be used, without which the data could be read."""
        super().__init__(_shown(message))
        self.of_row = of_row


class RunFailed(PatError):
    """The input was fine, but the run could not be completed (non-finite loss, parity out of tolerance)."""

    exit_status = 1


class Interrupted(RunFailed):
    """A signal has ended a run after its step; the same command goes on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


class FailedElsewhere(PatError):
    """The first process of a run has failed, and says how; this one ends with it."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status

    def __reduce__(self) -> tuple[type[FailedElsewhere], tuple[str, int]]:
        """Travel between processes with both arguments, of which an error keeps the first."""
        return type(self), (str(self), self.exit_status)


class Diverged(RunFailed):
    """Training came to infinite or undefined numbers."""


class ParityMissed(RunFailed):
    """Two forms of a model that ought to be the same function differ by more than rounding."""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def reason_of(error: BaseException) -> str:
    """Return on one line what an error says that first went wrong; a wrapper often says no more than that it did."""
    reason = one_line(error)
    while (cause := error.__cause__) is not None:
        error, reason = cause, one_line(cause) or reason
    return reason


def _shown(message: str) -> str:
    """Return a message that a terminal shows as it is: what it would obey, or cannot show, is written as an escape."""
    letters = (
        letter if letter.isprintable() else " " if letter.isspace() else letter.encode("unicode_escape").decode()
        for letter in message
    )
    line = "".join(letters).strip()
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 300]} … {line[-290:]}"
