"""Equal budgets: prune ratios of different methods are matched on the total number of parameters.

PAT at 25 % of the hidden size removes about a quarter of every matrix, the embedding's included. A method that cuts
other axes (heads, MLP channels) or pays for what it cuts (shortcut matrices, an untied head) is given the same number
of parameters in all, and takes the one of its settings that comes nearest, above or below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pat.families import get_family
from pat.surgery.dense import shrink_config
from pat.surgery.describe import count_parameters, head_dim

Setting = TypeVar("Setting")


def num_parameters(model: nn.Module) -> int:
    """Return how many numbers a model is made of, frozen ones included; a shared matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def pat_parameters(model: PreTrainedModel, pruned_hidden_size: int, *, untie: bool = False) -> int:
    """Return the exact size of the dense model that PAT makes of a base model, without making it.

    Args:
        model: the base model.
        pruned_hidden_size: d', a legal width.
        untie: whether a tied model gets a head of its own.

    Raises:
        PatError: unsupported family, or transformers refuses that width.
    """
    return count_parameters(pat_config(model, pruned_hidden_size, untie=untie))


def pat_config(model: PreTrainedModel, pruned_hidden_size: int, *, untie: bool = False) -> PretrainedConfig:
    """Return the configuration of the dense model that PAT makes of a base model; arguments as in `pat_parameters`."""
    family = get_family(model.config.model_type)
    return shrink_config(
        model.config,
        family,
        {family.hidden_size_field: pruned_hidden_size},
        head_dim=head_dim(model),
        tied=bool(model.config.tie_word_embeddings) and not untie,
    )


def nearest(settings: Iterable[Setting], size: Callable[[Setting], int], target: int) -> Setting:
    """Return the setting whose size is nearest to a target, above or below; ties go to the smaller model."""
    return min(settings, key=lambda setting: (abs(size(setting) - target), size(setting)))
