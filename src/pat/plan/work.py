"""How long it takes to measure shapes: what is read for each of them, times what the base takes on this machine."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch

from pat.nll import Example, batches_from_examples, evaluating
from pat.report.progress import phase
from pat.shape import AXES
from pat.training.preflight.estimate import span
from pat.training.preflight.speed import seconds_per_token
from pat.tuner.depth import LAYER_TOKENS

CALIBRATION_PASSES = {"hidden": 1.5, "mlp": 5.0, "heads": 2.0}
"""Times that the base could read the text of the calibration while an axis is calibrated and refitted, on SmolLM2-135M;
without whole layers it is read in turn."""


def num_read(cut: Collection[str], *, num_layers: int, num_calibrated: int, num_scored: int) -> float:
    """Return about how long some axes take to be cut and scored, in tokens that the base could read meanwhile.

    Args:
        cut: options of the axes that are cut; none for the base.
        num_layers: of the base.
        num_calibrated: tokens of the text of the calibration.
        num_scored: tokens of the rows that are scored, their prompts included.
    """
    reads = {axis: passes * num_calibrated for axis, passes in CALIBRATION_PASSES.items()}
    reads["layers"] = min(LAYER_TOKENS, num_calibrated) * num_layers
    return num_scored + sum(reads[axis] for axis in reads if AXES[axis].option in cut)


def say_expected_time(model: Any, rows: Sequence[Example], todo: float, num_shapes: int, num_steps: int) -> float:
    """Print on stderr how long measuring the shapes will take, by the base's time for some rows; return the seconds.

    Args:
        model: the base.
        rows: a batch of typical rows.
        todo: what is to be done, in tokens that the base reads.
        num_shapes: number of shapes, the base not among them.
        num_steps: steps that each of the best is tuned for afterwards.
    """
    batch = next(iter(batches_from_examples(rows, batch_size=len(rows), pad_token_id=0)))
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with phase("Timing the base model"), evaluating(model), torch.no_grad():
        model(**{name: tensor[:1, :1] for name, tensor in inputs.items()})  # reads the weights from disk
        seconds = todo * seconds_per_token(model, [inputs])
    then = ""
    if num_steps:
        then = f" The best shapes are tuned for {num_steps:,} steps each afterwards, whose time is not in it."
    print(f"Expected: {span(seconds)}, to cut and score {num_shapes} shapes beside the base.{then}", file=sys.stderr)
    return seconds
