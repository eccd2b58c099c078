"""Hard masked models of every family in float64, and their logits with transformers' casts to float32 lifted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, batch, build
from tiny_training import Float64, attach, logits, tuner_of
from torch import Tensor, nn

from pat.families import get_family

KEPT = 36


def logits64(model: nn.Module) -> Tensor:
    with Float64():
        result = logits(model)
    assert result.dtype == torch.float64
    return result


def masked_model(family: str, *, tied: bool, rotation: str = "none", pruned: int = KEPT, **fields: Any) -> nn.Module:
    """A hard masked model in float64 with random adapters, operators and kept channels, all far from their start."""
    base = build(family, tied=tied)
    if get_family(family).expert_parameters:
        base.set_experts_implementation("eager")  # the grouped kernel has no float64
    model = attach(base, rotation=rotation, pruned_hidden_size=pruned, **fields).double()
    tuner = tuner_of(model)
    if rotation == "pca":  # in float64: a basis stored in float32 is orthogonal to 1e-7 only
        tuner.calibrate([batch(seed=3, batch_size=8)] * 2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuner.set_step(1, 1)
    return model.eval()


CASES = [
    pytest.param(family, tied, dora, rotation, id=f"{family}-{tied=}-{dora=}-{rotation}")
    for family in FAMILIES
    for tied in (True, False)
    for dora in (False, True)
    for rotation in ("none", "pca")
    if rotation == "none" or not get_family(family).has_post_norms
]
