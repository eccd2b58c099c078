"""Runs a command in a process of its own that is hit at the n-th file operation in a folder: killed, torn or refused.

What a killed or torn process leaves behind can also be had of one run that nothing hits, which copies the folder before
each operation: a kill at all of them then costs only the runs that go on.

The processes are forked from one that has imported everything and computed nothing, so that each costs its run alone.
Operations are counted by Python's audit events; files that libraries write by themselves are caught where they are
called. A module of its own, because a process that is forked by a server imports what it runs.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from pat.cli import main
from pat.training import tune  # noqa: F401  (imported once, for all processes)

Fault = Literal["kill", "tear", "refuse"]

KILLED = 137
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["faults"])


@dataclass
class Operations:
    """The file operations of this process in a folder, of which one is hit."""

    folder: str
    moment: int
    fault: Fault
    count: int = 0
    names: list[str] = field(default_factory=list)
    unsynced: dict[str, None] = field(default_factory=dict)
    """Files that were written and are not known to be on the disk."""
    busy: bool = False
    kept: str = ""
    """The folder that takes what a process killed, or torn, at each operation would leave, once if it is the same."""
    _digests: set[str] = field(default_factory=set)

    def watch(self) -> None:
        """Watch from now on; it cannot be undone."""
        sys.addaudithook(self._hook)
        os.fsync = self._around(os.fsync, lambda number: f"/proc/self/fd/{number}", "fsync")
        torch.save = self._around(torch.save, lambda _, file, *__, **___: file, "torch.save")
        original = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._around(original, lambda _, file, *__, **___: file, "safetensors")

    def _around(self, function: Callable[..., Any], path_of: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            path = path_of(*args, **options)
            path = os.path.realpath(path) if isinstance(path, str | os.PathLike) else ""
            self._reached(name, path)
            if name == "fsync":
                self.unsynced.pop(path, None)
            else:
                self.unsynced[path] = None
            return function(*args, **options)

        return wrapper

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.busy:
            return
        if event == "open" and isinstance(args[0], str | bytes) and args[2] & _WRITING:
            path = os.path.realpath(os.fsdecode(args[0]))
            self._reached(event, path)
            if path.startswith(self.folder):
                self.unsynced[path] = None
        elif event in _EVENTS:
            path, descriptor = os.fsdecode(args[0]), args[-1] if event != "os.rename" else -1
            if descriptor is not None and descriptor >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
            self._reached(event, os.path.realpath(path))

    def _reached(self, name: str, path: str) -> None:
        if not path.startswith(self.folder):
            return
        self.count += 1
        self.names.append(f"{name} {path.removeprefix(self.folder)}")
        if self.kept:
            self.busy = True
            self._keep()
            self.busy = False
        if self.count != self.moment:
            return
        self.busy = True
        if self.fault == "refuse":
            self.busy = False
            if name == "torch.save":
                raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
            if name == "safetensors":
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if self.fault == "tear" and (torn := self._torn()):
            os.truncate(torn, os.path.getsize(torn) // 2)
        os._exit(KILLED)

    def _torn(self) -> str | None:
        """Return the file that was written last and may not be on the disk."""
        return next((path for path in reversed(self.unsynced) if os.path.isfile(path) and os.path.getsize(path)), None)

    def _keep(self) -> None:
        for fault in ("kill", "tear"):
            torn = self._torn() if fault == "tear" else None
            if not os.path.isdir(self.folder) or (fault == "tear" and torn is None):
                continue
            copy = Path(self.kept, f"{self.count}-{fault}")
            shutil.copytree(self.folder, copy, symlinks=True)
            if torn is not None:
                os.truncate(copy / os.path.relpath(torn, self.folder), os.path.getsize(torn) // 2)
            if (digest := _digest(copy)) in self._digests:
                shutil.rmtree(copy)
            self._digests.add(digest)


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_mode}\0".encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


@dataclass(frozen=True)
class Outcome:
    """The end of a command."""

    status: int | None
    said: str
    """What it wrote to stdout and stderr."""
    operations: list[str]
    seconds: float
    """How long it took; NaN if it did not come to its end."""


def run(
    argv: list[str],
    folder: Path,
    moment: int = 0,
    fault: Fault = "kill",
    *,
    signals: int = 0,
    kept: Path | None = None,
    seconds: float = 600,
) -> Outcome:
    """Run a command.

    Args:
        argv: the command and its flags.
        folder: the folder whose file operations are watched.
        moment: the operation that is hit, counted from 1; 0 is none.
        fault: what happens there.
        signals: number of SIGTERMs that it is sent after its first step.
        kept: takes a copy of the folder as a kill or a tear at each operation would leave it, named by the
            operation's number and the fault; one that is the same as an earlier one is left out.
        seconds: after which it is killed.
    """
    with pytest.MonkeyPatch.context() as patch:  # where the server finds this module, or each process imports it anew
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    log = folder.with_name(f"{folder.name}.log")
    log.touch()
    process = _context.Process(
        target=_child, args=(argv, str(folder), moment, fault, signals, str(kept or ""), str(log))
    )
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        assert seconds < 600, "the command hangs"
    said, _, ended = log.read_text(encoding="utf-8").partition("\0")
    seconds_taken, *operations = ended.splitlines() or ["nan"]
    log.unlink()
    return Outcome(process.exitcode, said, operations, float(seconds_taken))


def _child(argv: list[str], folder: str, moment: int, fault: Fault, signals: int, kept: str, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    gc.freeze()  # or each collection goes through everything that was imported
    torch.set_num_threads(1)
    if signals:
        _send_at_first_step(signals)
    operations = Operations(os.path.realpath(folder), moment, fault, kept=kept)
    operations.watch()
    began = time.monotonic()
    status = main(argv)
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(descriptor, "\n".join([f"\0{time.monotonic() - began}", *operations.names]).encode())
    os._exit(status)


def _send_at_first_step(number: int) -> None:
    from transformers.trainer_callback import DefaultFlowCallback

    original = DefaultFlowCallback.on_step_end

    def sending(self: Any, args: Any, state: Any, control: Any, **options: Any) -> Any:
        if state.global_step == 1 and str(args.output_dir).endswith("checkpoints"):
            for _ in range(number):
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **options)

    DefaultFlowCallback.on_step_end = sending
