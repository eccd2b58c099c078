"""Equal budgets: trainable parameters matched by rank, models matched by their whole number of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import nn

from pat.export.hollow import hollow_model
from pat.loading import load_config
from pat.plan import make_plan
from pat.training.arguments import TuneArguments


@dataclass(frozen=True)
class Target:
    """What PAT comes to at a ratio, and others are to match."""

    hidden_size: int
    pruned_hidden_size: int
    base_parameters: int
    num_parameters: int


def target_of(model: str, ratio: float) -> Target:
    """Return the sizes of a model and of what PAT makes of it, exact, from its configuration."""
    plan = make_plan(model, pruning_ratio=ratio)
    return Target(
        plan.base.hidden_size,
        plan.pruned.hidden_size,
        plan.base.total.num_parameters,
        plan.pruned.total.num_parameters,
    )


def lora_parameters_per_rank(model: nn.Module) -> int:
    """Return how many parameters LoRA has per rank on all linear layers but the output layer."""
    return sum(linear.in_features + linear.out_features for linear in tuned_linears(model).values())


def tuned_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that LoRA goes on, by path: all but the output layer, and what is frozen for good."""
    head = cast(Any, model).get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.weight.requires_grad
    }


def lora_rank(model: nn.Module, num_trainable: int) -> int:
    """Return the rank whose number of parameters comes closest to a number, at least 1."""
    return max(1, round(num_trainable / lora_parameters_per_rank(model)))


def pat_rank(arguments: TuneArguments, num_trainable: int) -> int:
    """Return the rank of LoRA with which LoRA, operators and mask come closest to a number of parameters, at least 1.

    Args:
        arguments: of `pat tune`, with any rank.
        num_trainable: to come close to, before the milestone.
    """
    name = str(arguments.model.model_name_or_path)
    counts = []
    for rank in (1, 2):
        arguments.model.lora_r = rank
        base_config, _ = load_config(name)
        model = get_peft_model(hollow_model(base_config, torch.bfloat16, torch.device("cpu")), arguments.pat_config())
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    per_rank = counts[1] - counts[0]
    return max(1, round((num_trainable - counts[0]) / per_rank) + 1)
