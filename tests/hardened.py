"""Adapters past their milestone without a training: every adapter parameter moved at random, then the mask hardened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from tiny_training import attach, tuner_of
from torch import nn


@torch.no_grad()
def scatter(model: nn.Module, *, scale: float, seed: int = 0) -> None:
    """Add noise to every trainable parameter, in proportion to its size, so that nothing is at its initial value.

    Args:
        model: a peft model.
        scale: of the noise, relative to a parameter's root mean square, or to 1/sqrt(fan-in) where that is zero.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = parameter.float().square().mean().sqrt().item() or parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(scale * size * noise)


def hardened(
    base: nn.Module, *, calibration: Iterable[Mapping[str, Any]] = (), scale: float = 0.3, seed: int = 0, **fields: Any
) -> PeftModel:
    """Attach a PAT adapter, calibrate it if there are batches, move all its parameters, and harden the mask."""
    model = attach(base, **fields)
    tuner = tuner_of(model)
    if batches := list(calibration):
        tuner.calibrate(batches)
    scatter(model, scale=scale, seed=seed)
    tuner.set_step(3, 2)
    return model.eval()
