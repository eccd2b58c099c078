"""Records: the results of commands as dataclasses that are written as JSON.

Every command returns one that derives from `Record`; `docs/schemas/` holds the JSON schemas, made of the dataclasses.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pat.errors import RunFailed, one_line
from pat.whole_files import write_whole

SCHEMA_VERSION = 2

PACKAGES = ("pat-llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "lm_eval")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a figure may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an extra
            continue
    return found | {"python": platform.python_version()}


def processor_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor, which Python itself knows on few systems; else the name of its architecture.

    Args:
        file: of Linux, in which the lines that begin with `model name` have it, on x86 for one.
    """
    names: list[str] = []
    with suppress(OSError):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()


@dataclass(frozen=True)
class Machine:
    """The machine that a command ran on."""

    device: str
    """Name of the accelerator, or of the processor."""
    num_cores: int | None
    num_threads: int
    """Number of threads of torch on the CPU. `pat tune` may have chosen fewer than torch's own, and the parts of `pat
    plan` that measure say their number themselves."""

    @classmethod
    def here(cls) -> Machine:
        """Return this machine."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
        return cls(device, os.cpu_count(), torch.get_num_threads())


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of a command; each command adds its own fields."""

    command: str
    schema_version: int = SCHEMA_VERSION
    versions: dict[str, str] = field(default_factory=installed_versions)
    """Versions of Python and of the libraries."""
    machine: Machine = field(default_factory=Machine.here)
    warnings: list[str] = field(default_factory=list)
    """Lines that were logged about what is doubtful, cut, dropped or replaced."""


def environment() -> dict[str, Any]:
    """Return the versions and the machine that a figure belongs to, for what is no record of a command."""
    return {"schema_version": SCHEMA_VERSION, "versions": installed_versions(), "machine": asdict(Machine.here())}


def to_json(record: Any) -> str:
    """Return a record, or a dictionary, as JSON. Numbers that are not finite become null, because JSON has none."""
    return json.dumps(plain(asdict(record) if is_dataclass(record) else record), indent=2) + "\n"  # type: ignore[arg-type]


def write_record(path: Path, record: Any) -> None:
    """Write a record, or a dictionary, to a JSON file; where that fails, the file is as it was before.

    Raises:
        RunFailed: it cannot be written, such as on a disk that is full.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    try:
        if target.exists() and not target.is_file():  # such as a device, which nothing can take the place of
            target.write_text(to_json(record), encoding="utf-8")
        else:
            write_whole(target, to_json(record))
    except OSError as error:
        raise RunFailed(f"{path}: could not be written ({error.strerror or one_line(error)}).") from error


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Yield a list that grows by every warning that pat logs meanwhile."""
    collector = _Collector(logging.WARNING)
    logger = logging.getLogger("pat")
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)


class _Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        others = [*logging.getLogger().handlers, *logging.getLogger("pat").handlers]
        if others == [self] and logging.lastResort is not None:  # which this handler has taken the place of
            logging.lastResort.handle(record)


def plain(value: Any) -> Any:
    """Return a value as JSON has it; see `to_json`."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value)
