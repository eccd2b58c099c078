"""Figures of a run: what each of its models comes to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pat.evaluation.perplexity import NLL, Example, Progress, response_nll
from pat.export.verify import Parity

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
