"""LLM-Pruner in the shape that its authors publish: some layers stay whole, heads and channels go by one ratio.

`llm_pruner` makes a model of stock shape, and is free to leave the attention whole. This one keeps to what the authors'
commands for models of 32 layers do: the first four and the last two layers stay whole, and in each of the others heads
and MLP channels go by one ratio, the heads in whole groups (a key/value head and all queries that attend to it), as
many as fit into the ratio. What is left has layers of two sizes: no stock class loads it. The importance is that of
`llm_pruner`, and so is the calibration text, of which the authors take less (10 sequences of 64 tokens).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.families import get_family
from pat.surgery.describe import head_dim

from .budget import nearest, num_parameters
from .llm_pruner import Shape, base_shape, check_prunable, cut_plan, group_sizes, layer_importance

NUM_SPARED_FIRST, NUM_SPARED_LAST = 4, 2
"""Number of layers at either end that are left whole."""


def llm_pruner_published(
    model: PreTrainedModel, calibration: Sequence[Tensor], *, target_parameters: int
) -> tuple[PreTrainedModel, Shape]:
    """Return a new, smaller model with layers of two shapes, and the shape of those that were cut.

    Args:
        model: a dense base model without adapters; it stays as it is.
        calibration: token sequences, each `(T,)`.
        target_parameters: size of the result, come to as closely as one ratio for heads and channels allows.

    Raises:
        PatError: see `check_published`.
    """
    check_published(model)
    family = get_family(model.config.model_type)
    shape = published_shape(model, target_parameters)
    importance = layer_importance(model, calibration)
    pruned = copy.deepcopy(model)
    for index in _cut_layers(model):
        plan = cut_plan(importance[index], shape, head_dim(model))
        for path, (keep, axis) in plan.items():
            linear = cast(nn.Linear, pruned.get_submodule(f"{family.layers}.{index}.{path}"))
            linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, keep.to(linear.weight.device)))
            if axis == 0 and linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach().index_select(0, keep.to(linear.bias.device)))
            linear.out_features, linear.in_features = linear.weight.shape
    return pruned, shape


def check_published(model: PreTrainedModel) -> None:
    """Tell whether a model can be cut so.

    Raises:
        PatError: its attention or MLP is not made of separate projections, or no layer lies between the spared ones.
    """
    check_prunable(model, get_family(model.config.model_type))
    if not _cut_layers(model):
        raise PatError(
            f"Got a model of {model.config.num_hidden_layers} layers; LLM-Pruner as published spares the first "
            f"{NUM_SPARED_FIRST} and the last {NUM_SPARED_LAST}, so expected more. Leave the method out."
        )


def published_shape(model: PreTrainedModel, target_parameters: int) -> Shape:
    """Return the shape, of the layers that are cut, that comes nearest to a number of parameters."""
    base, total = base_shape(model), num_parameters(model)
    of_all_layers = group_sizes(model, get_family(model.config.model_type))
    query, key_value, channel = (number // model.config.num_hidden_layers for number in of_all_layers)
    num_cut = len(_cut_layers(model))

    def at(num_channels: int) -> Shape:
        gone = base.num_key_value_heads * (base.intermediate_size - num_channels) // base.intermediate_size
        return Shape(base.num_key_value_heads - gone, base.queries_per_group, num_channels)

    def size(shape: Shape) -> int:
        groups = base.num_key_value_heads - shape.num_key_value_heads
        channels: int = base.intermediate_size - shape.intermediate_size
        cut: int = num_cut * (groups * (key_value + base.queries_per_group * query) + channels * channel)
        return total - cut

    return nearest(map(at, range(1, base.intermediate_size + 1)), size, target_parameters)


def _cut_layers(model: PreTrainedModel) -> range:
    return range(NUM_SPARED_FIRST, model.config.num_hidden_layers - NUM_SPARED_LAST)
