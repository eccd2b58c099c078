"""The parent's end of a model's process: starts it, asks it, and makes sense of its death."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from pat.benchmark.host import ModelFacts, OutOfMemory, serve
from pat.errors import RunFailed

PATIENCE = 5
"""Seconds that a process has to leave by itself."""

KILLED = "its process was killed by the operating system, most likely because memory ran out"


class Worker:
    """A model (`load`: arguments of `Host`) in a process of its own, started again when the system has killed it."""

    def __init__(self, load: dict[str, Any], target: Callable[[Connection], None] = serve) -> None:
        self._load, self._target = load, target
        self._connection, self._process = self._launch()

    def load(self) -> ModelFacts:
        """Load the model.

        Raises:
            PatError: the model cannot be used.
            RunFailed: it does not fit into memory, or the process fails.
        """
        try:
            facts: ModelFacts = self._exchange("load", self._load)
        except OutOfMemory as error:
            raise RunFailed(
                f"The model {self._load['name']!r} does not fit into memory beside the other one ({error}); choose a "
                "smaller dtype or another device."
            ) from error
        return facts

    def ask(self, action: str, **arguments: Any) -> Any:
        """Have the model do something, see `pat.benchmark.host.Host`, and return what comes of it.

        Raises:
            OutOfMemory: memory did not suffice.
            RunFailed: it failed for another reason.
        """
        if not self._process.is_alive():
            self._connection, self._process = self._launch()
            self.load()
        return self._exchange(action, arguments)

    def close(self) -> None:
        """End the process: it leaves when nobody asks any more, or is killed if it is in the middle of something."""
        self._connection.close()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()

    def _launch(self) -> tuple[Connection, BaseProcess]:
        context = get_context("spawn")  # torch's threads do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=self._target, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # or the end of the process would not be the end of the connection
        return ours, process

    def _exchange(self, action: str, arguments: dict[str, Any]) -> Any:
        try:
            self._connection.send((action, arguments))
            answer = self._connection.recv()
        except (EOFError, OSError):  # OSError: it died before it could read
            answer = self._explain_death()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _explain_death(self) -> RunFailed:
        self._process.join(PATIENCE)
        self.close()
        if self._process.exitcode == -signal.SIGKILL:
            return OutOfMemory(KILLED)
        return RunFailed(f"The process of the model {self._load['name']!r} ended with status {self._process.exitcode}.")
