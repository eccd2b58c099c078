"""Figures of a run: what each of its models comes to."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig

from pat.checkpoint.verify import Parity
from pat.nll import NLL, Example, response_nll
from pat.surgery.describe import count_parameters

EVAL_BATCH_SIZE = 8


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    num_parameters: int
    num_bytes: int
    """Of the weights as they are stored in a checkpoint."""

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> Size:
        """Return the size of the model that a configuration describes, stored in a dtype."""
        num_parameters = count_parameters(config)
        return cls(num_parameters, num_parameters * dtype.itemsize)

    def with_adapter(self, model: nn.Module) -> Size:
        """Add what is trainable in an adapted model."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Size(
            self.num_parameters + sum(p.numel() for p in trainable),
            self.num_bytes + sum(p.numel() * p.element_size() for p in trainable),
        )


@dataclass(frozen=True)
class ModelFigures:
    """What one model of a run comes to."""

    num_parameters: int
    num_bytes: int
    """Of the weights as they are stored in a checkpoint."""
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
    model: nn.Module,
    examples: Sequence[Example],
    pad_token_id: int,
    *,
    stage: str,
    size: Size,
    show_progress: bool = True,
) -> ModelFigures:
    """Time a model's held-out likelihood, with a progress bar on stderr, and put its sizes beside it.

    Args:
        model: scored as it is, in its own device and dtype.
        examples: tokenised held-out rows; none leave likelihood and speed open.
        pad_token_id: for padding batches.
        stage: name on the progress bar.
        size: of its weights (given, because quantised storage holds several in one element).
        show_progress: whether there is a bar.
    """
    nll: NLL | None = None
    speed: float | None = None
    if examples:
        with tqdm(desc=f"Scoring {stage}", unit="batch", file=sys.stderr, disable=not show_progress) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            start = time.perf_counter()
            nll = response_nll(model, examples, batch_size=EVAL_BATCH_SIZE, pad_token_id=pad_token_id, progress=advance)
            speed = sum(len(example["input_ids"]) for example in examples) / (time.perf_counter() - start)
    return ModelFigures(
        num_parameters=size.num_parameters,
        num_bytes=size.num_bytes,
        held_out_nll=None if nll is None else nll.nll,
        num_held_out_tokens=0 if nll is None else nll.num_tokens,
        tokens_per_second=speed,
    )
