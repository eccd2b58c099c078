"""Figures of a run: measuring them, and the schema'd `results.json` they end up in."""

from __future__ import annotations

import enum
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pat.evaluation.perplexity import NLL, Example, Progress, response_nll
from pat.export.verify import Parity

SCHEMA_VERSION = 1

EVAL_BATCH_SIZE = 8


@dataclass(frozen=True)
class ModelFigures:
    """What one model of a run comes to."""

    num_parameters: int
    num_bytes: int
    held_out_nll: float | None
    """Mean over response tokens, in nats; None without held-out data."""
    num_held_out_tokens: int
    tokens_per_second: float | None
    """Forward throughput over the held-out rows, padding excluded."""


@dataclass(frozen=True)
class TuneResult:
    """Where a run left its outputs, and its main figures."""

    output_dir: Path
    model_dir: Path
    adapter_dir: Path
    figures: dict[str, ModelFigures]
    """By stage: `base`, `tuned` (masked), `dense`."""
    parity: Parity


def measure(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, *, progress: Progress | None = None
) -> ModelFigures:
    """Count a model's parameters and bytes, and time its held-out likelihood."""
    parameters = list(model.parameters())
    nll: NLL | None = None
    speed: float | None = None
    if examples:
        start = time.perf_counter()
        nll = response_nll(model, examples, batch_size=EVAL_BATCH_SIZE, pad_token_id=pad_token_id, progress=progress)
        speed = sum(len(example["input_ids"]) for example in examples) / (time.perf_counter() - start)
    return ModelFigures(
        num_parameters=sum(p.numel() for p in parameters),
        num_bytes=sum(p.numel() * p.element_size() for p in parameters),
        held_out_nll=None if nll is None else nll.nll,
        num_held_out_tokens=0 if nll is None else nll.num_tokens,
        tokens_per_second=speed,
    )


def environment() -> dict[str, Any]:
    """Return the versions and the machine a figure belongs to."""
    packages = ("pat-llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
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
