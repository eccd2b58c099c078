"""Equal budgets: trainable parameters matched by rank, models matched by their whole number of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import nn

from compare.baselines import pat_parameters
from pat.checkpoint.hollow import hollow_model
from pat.loading import empty_model, load_config
from pat.plan.vocabulary import three_quarters
from pat.shape import AXES
from pat.surgery.axes import prunable
from pat.surgery.costs import build_skeleton, pruned_config
from pat.surgery.describe import count_parameters
from pat.training.arguments import TuneArguments
from pat.training.preflight.check import compacts
from pat.tuner.config import PatConfig
from pat.tuner.prepare import check_config
from pat.widths import choose_width


@dataclass(frozen=True)
class Target:
    """Sizes of PAT's model at a ratio, whose number of parameters the others are to match."""

    hidden_size: int
    pruned_hidden_size: int
    num_parameters: int


def target_of(model: str, ratio: float) -> Target:
    """Return the sizes of a model and of what PAT makes of it, exact, from its configuration."""
    config, family = load_config(model)
    hidden_size = getattr(config, family.hidden_size_field)
    width = choose_width(hidden_size, config.num_attention_heads, pruning_ratio=ratio).pruned_hidden_size
    return Target(hidden_size, width, pat_parameters(empty_model(config), width))


def most_of_the_vocabulary(model: str) -> int:
    """Return three quarters of a model's number of tokens, down to a multiple that a trimmed vocabulary can have."""
    config, _ = load_config(model)
    return three_quarters(int(config.vocab_size))


def sizes_within(
    model: str, target: Target, pat_config: PatConfig, *, vocabulary_size: int | None = None
) -> dict[str, Any]:
    """Return the flags with which PAT comes as close to a number of parameters as the channels of an MLP allow.

    Its own choice prefers sizes that hardware likes, up to 3 % away; others are matched to the parameter.

    Args:
        model: name of the base model.
        target: what to stay within.
        pat_config: of PAT, with a ratio.
        vocabulary_size: to trim to; None trims nothing.

    Returns:
        Names and values of options; none where no MLP is cut, so that the hidden size is the target's anyway.
    """
    config, family = load_config(model)
    if vocabulary_size is not None:
        config.vocab_size = vocabulary_size
        pat_config.pruning_ratio = 1 - target.num_parameters / count_parameters(config)
    shape = check_config(config, family, pat_config)
    if not shape.cuts("mlp"):
        return {}
    base, mlp = prunable(empty_model(config)), AXES["mlp"].field
    none, whole = (base.count(shape.pruned_sizes | {mlp: size}) for size in (0, shape.size("mlp")))
    channels = (target.num_parameters - none) * shape.size("mlp") // (whole - none)
    sizes = shape.pruned_sizes | {mlp: channels}
    cut = {axis.option: sizes[axis.field] for axis in AXES.values() if shape.cuts(axis.name)}
    return {"pruning_ratio": None} | cut


def lora_targets(base: nn.Module) -> list[str]:
    """Return the names of the linear layers of a base model that LoRA goes on: all but the output layer.

    In a pruned model it goes on those of the same names, not on what pruning has added (SliceGPT's shortcuts).
    """
    head = cast(Any, base).get_output_embeddings()
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head}
    return sorted({name.rpartition(".")[2] for name in linears})


def lora_parameters_per_rank(model: nn.Module, targets: Sequence[str]) -> int:
    """Return how many parameters LoRA has per rank."""
    return sum(linear.in_features + linear.out_features for linear in _linears(model, targets))


def lora_rank(model: nn.Module, targets: Sequence[str], num_trainable: int, *, dora: bool = False) -> int:
    """Return the rank whose number of parameters comes closest to a number, at least 1; DoRA has magnitudes, too."""
    magnitudes = sum(linear.out_features for linear in _linears(model, targets)) if dora else 0
    return max(1, round((num_trainable - magnitudes) / lora_parameters_per_rank(model, targets)))


def _linears(model: nn.Module, targets: Sequence[str]) -> list[nn.Linear]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]


def pat_rank(arguments: TuneArguments, num_trainable: int) -> tuple[int, int]:
    """Return the rank of LoRA with which PAT comes closest to a number of trainable parameters, and PAT's number.

    A run that compacts is counted on the small model, where it takes nearly all of its steps; before the milestone
    LoRA of that rank is larger by what is cut, and operators and mask are beside it.

    Args:
        arguments: of `pat tune`, with the sizes of the pruned model and any rank.
        num_trainable: to come close to.
    """
    name = str(arguments.model.model_name_or_path)
    base_config, family = load_config(name)
    base_config.vocab_size = arguments.run.vocabulary_size or base_config.vocab_size
    if compacts(arguments.run.no_compact, arguments.pat_config()):
        shape = check_config(base_config, family, arguments.pat_config())
        skeleton = build_skeleton(base_config, torch.float32)
        small = empty_model(pruned_config(skeleton, shape, tied=bool(base_config.tie_word_embeddings)))
        targets, dora = lora_targets(small), bool(arguments.model.use_dora)
        rank = lora_rank(small, targets, num_trainable, dora=dora)
        magnitudes = sum(linear.out_features for linear in _linears(small, targets)) if dora else 0
        return rank, rank * lora_parameters_per_rank(small, targets) + magnitudes
    counts = []
    for rank in (1, 2):
        arguments.model.lora_r = rank
        model = get_peft_model(hollow_model(base_config, torch.bfloat16, torch.device("cpu")), arguments.pat_config())
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    per_rank = counts[1] - counts[0]
    rank = max(1, round((num_trainable - counts[0]) / per_rank) + 1)
    return rank, counts[0] + (rank - 1) * per_rank
