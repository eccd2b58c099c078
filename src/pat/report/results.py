"""The schema'd `results.json` that a run leaves behind."""

from __future__ import annotations

import enum
import json
import math
import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SCHEMA_VERSION = 1

PACKAGES = ("pat-llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """Return the versions and the machine a figure belongs to."""
    versions = {name: version(name) for name in PACKAGES}
    with suppress(PackageNotFoundError):  # an extra
        versions["lm_eval"] = version("lm_eval")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": versions | {"python": platform.python_version()},
        "machine": {"device": device, "num_cores": os.cpu_count(), "num_threads": torch.get_num_threads()},
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a results file; non-finite numbers become null, because JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(results), indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Iterable):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value)
