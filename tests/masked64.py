"""Hard masked models in float64, and their logits with transformers' casts to float32 lifted."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from tiny_models import batch, shallow
from tiny_training import Float64, attach, logits, tuner_of
from torch import Tensor, nn

from pat.families import get_family
from pat.surgery.rotation import equalised_gain, gain_block

KEPT = 36


def logits64(model: nn.Module) -> Tensor:
    with Float64():
        result = logits(model)
    assert result.dtype == torch.float64
    return result


@torch.no_grad()
def in_float64(model: PeftModel) -> PeftModel:
    """A copy of a hard masked model in float64, basis and gain factors as they were before they were rounded."""
    twin = copy.deepcopy(model)
    base, tuner = twin.get_base_model(), tuner_of(twin)
    family = get_family(base.config.model_type)
    if family.expert_parameters:
        base.set_experts_implementation("eager")  # the grouped kernel has no float64
    twin.double()
    mask = tuner.mask()
    state = mask.state_dict()
    if mask.basis is not None:
        for _ in range(2):  # Newton's iteration to the nearest orthogonal matrix: 1e-7, 1e-14, 0
            state["basis"] = 1.5 * state["basis"] - 0.5 * state["basis"] @ state["basis"].mT @ state["basis"]
    if mask.head_factor is not None:
        gain = base.get_submodule(family.final_norm).weight + family.gain_offset
        block = gain_block(gain, tuner.pat_config().gain_tolerance)
        state["head_factor"] = torch.where(block, equalised_gain(gain, block) / gain, 1.0)
    mask.load_state_dict(state)
    return twin.eval()


def masked_model(family: str, *, tied: bool, rotation: str = "none", pruned: int = KEPT, **fields: Any) -> nn.Module:
    """A hard masked model in float64 with random adapters, operators and kept channels, all far from their start."""
    base = shallow(family, tied=tied)
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
