"""Runs a command in a process of its own that is hit at the n-th file operation in a folder: killed, torn or refused.

The processes are forked from one that has imported everything and computed nothing, so that each costs its run alone.
Operations are counted by Python's audit events; files that libraries write by themselves are caught where they are
called. A module of its own, because a process that is forked by a server imports what it runs.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import sys
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
        if self.fault == "tear":
            for torn in reversed(self.unsynced):
                if os.path.isfile(torn) and os.path.getsize(torn):
                    os.truncate(torn, os.path.getsize(torn) // 2)
                    break
        os._exit(KILLED)


@dataclass(frozen=True)
class Outcome:
    """The end of a command."""

    status: int | None
    said: str
    """What it wrote to stdout and stderr."""
    operations: list[str]


def run(argv: list[str], folder: Path, moment: int = 0, fault: Fault = "kill", signals: int = 0) -> Outcome:
    """Run a command, hit at a moment, counted from 1; 0 is never. It is sent so many SIGTERMs after its first step."""
    with pytest.MonkeyPatch.context() as patch:  # where the server finds this module, or each process imports it anew
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    log = folder.with_name(f"{folder.name}.log")
    process = _context.Process(target=_child, args=(argv, str(folder), moment, fault, signals, str(log)))
    process.start()
    process.join(600)
    assert process.exitcode is not None, "the command hangs"
    said, _, operations = log.read_text(encoding="utf-8").partition("\0")
    log.unlink()
    return Outcome(process.exitcode, said, operations.splitlines())


def _child(argv: list[str], folder: str, moment: int, fault: Fault, signals: int, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    gc.freeze()  # or each collection goes through everything that was imported
    torch.set_num_threads(1)
    if signals:
        _send_at_first_step(signals)
    operations = Operations(os.path.realpath(folder), moment, fault)
    operations.watch()
    status = main(argv)
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(descriptor, b"\0" + "\n".join(operations.names).encode())
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
