"""The parent's end of a worker: starts it, asks it, and makes sense of its death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from pat.benchmark.worker import BAD_INPUT, FAILED, OUT_OF_MEMORY
from pat.errors import PatError, RunFailed

COMMAND = (sys.executable, "-m", "pat.benchmark.worker")

PATIENCE = 10
"""Seconds that a worker has to leave by itself."""

KILLED = "its process was killed by the operating system, most likely because memory ran out"


class Worker:
    """A model in a process of its own; a process that the system has killed is started again when needed.

    Args:
        request: what to load and how, see `pat.benchmark.worker.Host`.
        command: what runs as the process.
    """

    def __init__(self, request: Mapping[str, Any], command: Sequence[str] = COMMAND) -> None:
        self._request, self._command = request, command
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def launch(self) -> None:
        """Start the process; it takes seconds until it has imported what it needs."""
        self.close()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # until `close`
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
        )

    def load(self) -> dict[str, Any]:
        """Load the model.

        Returns:
            Its facts.

        Raises:
            PatError: the model cannot be used.
            RunFailed: it does not fit into memory, or the process fails.
        """
        facts = self._exchange({"do": "load", **self._request})
        if facts.get("error") == OUT_OF_MEMORY:
            raise RunFailed(
                f"The model {self._request['name']!r} does not fit into memory beside the other one "
                f"({facts['message']}); choose a smaller dtype or another device."
            )
        return facts

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Returns:
            The answer; with the keys `error` (always `out_of_memory`) and `message` if memory did not suffice.

        Raises:
            RunFailed: the request failed for another reason.
        """
        if self._process is None:
            self.launch()
            self.load()
        return self._exchange({"do": action, **arguments})

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with self._process as process:
                process.terminate()
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:  # it died before it could read
            line = ""
        if not line.endswith("\n"):
            return self._explain_death(process)
        answer: dict[str, Any] = json.loads(line)
        if answer.get("error") == BAD_INPUT:
            raise PatError(answer["message"])
        if answer.get("error") == FAILED:
            raise RunFailed(f"The model {self._request['name']!r} failed: {answer['message']}")
        return answer

    def _explain_death(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        status = process.wait()
        assert self._log is not None
        self._log.seek(0)
        said = [line for line in self._log.read().splitlines() if line.strip()]
        self.close()
        if status == -signal.SIGKILL:
            return {"error": OUT_OF_MEMORY, "message": KILLED}
        last = f": {said[-1]}" if said else ""
        raise RunFailed(f"The process of the model {self._request['name']!r} ended with status {status}{last}")
