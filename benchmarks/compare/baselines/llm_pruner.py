"""LLM-Pruner (Ma et al., 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models"), block-wise.

What depends on each other goes together: a query head is its rows of q and columns of o; a key/value head is its rows
of k and v together with all query heads that attend to it; an MLP channel is its rows of gate and up and its column of
down. The importance of such a group is the first-order Taylor estimate of what the next-token loss changes when its
parameters become zero, element by element: the sum of |w * dL/dw|, the gradient being that of the mean loss over a few
sequences (the paper's first-order element-wise variant).

Where we differ from the paper:

- Every layer loses the same number of groups, the first and last ones too, which the paper spares. So the result is an
  ordinary model of the base's class with a smaller configuration; layers of different sizes need a class of their own.
- Grouped-query attention, which the paper does not treat: of the key/value heads the most important ones stay, and of
  each the same number of most important query heads, so that the attention stays a grouped-query attention.
- The paper prunes heads and channels by one ratio. Few head counts can be loaded (transformers demands of Llama,
  Gemma 2/3 and others that the hidden size be a multiple of the number of heads), so one ratio can rarely be had.
  Instead each loadable head count is completed by the MLP channels that meet the budget, and of these models the one
  with the lowest loss on the calibration text is taken. Where no head can go, the channels alone pay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pat.errors import PatError
from pat.families import Family, get_family
from pat.surgery.dense import build_dense
from pat.surgery.describe import head_dim

from .budget import nearest, num_parameters
from .calibration import batched
from .working_copy import float32_copy

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"

BATCH_SIZE = 4
"""Sequences of one backward pass."""


@dataclass(frozen=True)
class Shape:
    """The sizes that LLM-Pruner changes, the same in every layer."""

    num_key_value_heads: int
    queries_per_group: int
    """Query heads for each key/value head."""
    intermediate_size: int

    @property
    def num_attention_heads(self) -> int:
        """Query heads in all."""
        return self.num_key_value_heads * self.queries_per_group


@dataclass(frozen=True)
class Importance:
    """Taylor importance of the groups of one layer, float64."""

    queries: Tensor
    """Rows of q and columns of o, by head, `(num_key_value_heads, queries_per_group)`."""
    keys_values: Tensor
    """Rows of k and v, by head, `(num_key_value_heads,)`."""
    channels: Tensor
    """Rows of gate and up and columns of down, `(intermediate_size,)`."""


def llm_pruner(
    model: PreTrainedModel, calibration: Sequence[Tensor], *, target_parameters: int
) -> tuple[PreTrainedModel, Shape]:
    """Return a new, smaller model of the same class, and its shape; the model passed in stays as it is.

    Args:
        model: a dense base model without adapters.
        calibration: token sequences, each `(T,)`.
        target_parameters: size of the result, met to within half a channel of every layer; at the size of the base
            nothing is cut and the result is its exact copy.

    Raises:
        PatError: the family's attention or MLP is not made of separate projections, or no calibration text.
    """
    family = get_family(model.config.model_type)
    check_prunable(model, family)
    importance = layer_importance(model, calibration)
    shapes = loadable_shapes(model, target_parameters)
    if len(shapes) == 1:
        return _build(model, importance, shapes[0]), shapes[0]
    losses = {shape: _mean_loss(_build(model, importance, shape), calibration) for shape in shapes}
    shape = min(shapes, key=losses.__getitem__)
    return _build(model, importance, shape), shape


def loadable_shapes(model: PreTrainedModel, target_parameters: int) -> list[Shape]:
    """Return, for each loadable pair of head counts, the shape that comes nearest to a number of parameters.

    Head counts with which it is missed by more than half a channel of every layer are left out; if it is missed with
    all of them, the nearest shape alone is returned.
    """
    base, family = base_shape(model), get_family(model.config.model_type)
    total = num_parameters(model)
    query, key_value, channel = group_sizes(model, family)

    def size(shape: Shape) -> int:
        queries = query * (base.num_attention_heads - shape.num_attention_heads)
        keys_values = key_value * (base.num_key_value_heads - shape.num_key_value_heads)
        return total - queries - keys_values - channel * (base.intermediate_size - shape.intermediate_size)

    def complete(groups: int, queries: int) -> Shape:
        most = Shape(groups, queries, base.intermediate_size)
        ideal = base.intermediate_size - max(0, size(most) - target_parameters) // channel
        options = (Shape(groups, queries, min(max(1, n), base.intermediate_size)) for n in (ideal - 1, ideal))
        return nearest(options, size, target_parameters)

    shapes = [
        complete(groups, queries)
        for groups in range(1, base.num_key_value_heads + 1)
        for queries in range(1, base.queries_per_group + 1)
        if _is_loadable(model, Shape(groups, queries, base.intermediate_size))
    ]
    near = [shape for shape in shapes if abs(size(shape) - target_parameters) <= channel // 2]
    return near or [nearest(shapes, size, target_parameters)]


def layer_importance(model: PreTrainedModel, calibration: Iterable[Tensor]) -> list[Importance]:
    """Return the Taylor importance of the groups of every layer."""
    family, base = get_family(model.config.model_type), base_shape(model)
    term = taylor_terms(model, calibration, _cut_parameters(model, family))
    per_head = head_dim(model)
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    layers = []
    for index in range(model.config.num_hidden_layers):
        prefix = f"{family.layers}.{index}."

        def rows(path: str, prefix: str = prefix) -> Tensor:
            weight = term(f"{prefix}{path}.weight").abs().sum(1)
            return weight + term(f"{prefix}{path}.bias").abs() if f"{prefix}{path}.bias" in biases else weight

        def columns(path: str, prefix: str = prefix) -> Tensor:
            return term(f"{prefix}{path}.weight").abs().sum(0)

        queries = (rows(QUERY) + columns(OUTPUT)).unflatten(0, (base.num_key_value_heads, -1, per_head)).sum(-1)
        keys_values = (rows(KEY) + rows(VALUE)).unflatten(0, (base.num_key_value_heads, per_head)).sum(-1)
        layers.append(Importance(queries, keys_values, rows(GATE) + rows(UP) + columns(DOWN)))
    return layers


def taylor_terms(
    model: PreTrainedModel, calibration: Iterable[Tensor], names: Collection[str]
) -> Callable[[str], Tensor]:
    """Return a function that gives w * dL/dw of a parameter, float64; L is the mean next-token loss in nats.

    To first order, scaling parameters by 1 - t changes the loss by -t times the sum of their terms. Terms are made one
    parameter at a time, or those of a model of 7B would not fit beside it on one card.

    Args:
        model: whose loss.
        calibration: token sequences, each `(T,)`.
        names: of the parameters that are asked for; others get no gradient.
    """
    work = float32_copy(model)
    parameters = {name: parameter.requires_grad_(name in names) for name, parameter in work.named_parameters()}
    batches = list(batched(list(calibration), BATCH_SIZE))
    num_targets = sum(batch.numel() - len(batch) for batch in batches)
    with torch.enable_grad():
        for batch in batches:
            ids = batch.to(work.device)
            loss = work(input_ids=ids, labels=ids, use_cache=False).loss
            (loss * ((batch.numel() - len(batch)) / num_targets)).backward()

    def term(name: str) -> Tensor:
        gradient = parameters[name].grad
        assert gradient is not None, f"{name} is not among the names"
        return parameters[name].detach().double() * gradient.double()

    return term


def _cut_parameters(model: PreTrainedModel, family: Family) -> set[str]:
    """Return the names of the parameters of all projections that are cut."""
    paths = (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)
    cut = tuple(f".{path}.{kind}" for path in paths for kind in ("weight", "bias"))
    return {name for name, _ in model.named_parameters() if name.startswith(f"{family.layers}.") and name.endswith(cut)}


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, calibration: Sequence[Tensor]) -> float:
    total, num_targets = 0.0, 0
    for batch in batched(calibration, BATCH_SIZE):
        ids = batch.to(model.device)
        count = batch.numel() - len(batch)
        total += count * float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        num_targets += count
    return total / num_targets


def _build(model: PreTrainedModel, importance: Sequence[Importance], shape: Shape) -> PreTrainedModel:
    weights = dict(_cut(model, get_family(model.config.model_type), importance, shape))
    with torch.random.fork_rng():
        pruned = build_dense(model, _config(model, shape), weights, model.dtype)
    cast(nn.Module, pruned).to(model.device)
    return pruned


def _cut(
    model: PreTrainedModel, family: Family, importance: Sequence[Importance], shape: Shape
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the pruned model: the base's own, without the rows and columns of what goes."""
    cuts: dict[str, tuple[Tensor, int]] = {}
    for index, layer in enumerate(importance):
        plan = cut_plan(layer, shape, head_dim(model))
        for path, (keep, axis) in plan.items():
            cuts[f"{family.layers}.{index}.{path}.weight"] = keep, axis
            if axis == 0:
                cuts[f"{family.layers}.{index}.{path}.bias"] = keep, axis
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name in cuts:
            keep, axis = cuts[name]
            weight = weight.index_select(axis, keep.to(weight.device))
        yield name, weight.clone()


def cut_plan(layer: Importance, shape: Shape, per_head: int) -> Mapping[str, tuple[Tensor, int]]:
    """Return, for each projection of a layer, what stays of it, ascending, and whether as rows (0) or columns (1)."""
    queries, groups, channels = _kept(layer, shape, per_head)
    return {
        QUERY: (queries, 0),
        KEY: (groups, 0),
        VALUE: (groups, 0),
        OUTPUT: (queries, 1),
        GATE: (channels, 0),
        UP: (channels, 0),
        DOWN: (channels, 1),
    }


def _kept(layer: Importance, shape: Shape, per_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept rows of q, of k and v, and of gate and up, each ascending."""
    num_queries = layer.queries.shape[1]
    best_queries = layer.queries.sort(dim=1, descending=True, stable=True)
    kept_value = best_queries.values[:, : shape.queries_per_group].sum(1)
    groups = _largest(layer.keys_values + kept_value, shape.num_key_value_heads)
    within = best_queries.indices[groups, : shape.queries_per_group].sort(1).values
    queries = (groups.unsqueeze(1) * num_queries + within).flatten()
    return _rows(queries, per_head), _rows(groups, per_head), _largest(layer.channels, shape.intermediate_size)


def _largest(scores: Tensor, count: int) -> Tensor:
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _rows(heads: Tensor, per_head: int) -> Tensor:
    return (heads.unsqueeze(1) * per_head + torch.arange(per_head, device=heads.device)).flatten()


def base_shape(model: PreTrainedModel) -> Shape:
    """Return the sizes of a model's layers."""
    config = model.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Shape(groups, config.num_attention_heads // groups, config.intermediate_size)


def group_sizes(model: PreTrainedModel, family: Family) -> tuple[int, int, int]:
    """Return how many parameters all layers hold of one query head, one key/value head, and one MLP channel."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    base, num_layers = base_shape(model), model.config.num_hidden_layers

    def size(*paths: str) -> int:
        prefix = f"{family.layers}.0."
        # The bias of o and down lies in the residual stream and stays.
        biased = (path for path in paths if path not in (OUTPUT, DOWN))
        return sum(sizes[f"{prefix}{path}.weight"] for path in paths) + sum(
            sizes.get(f"{prefix}{path}.bias", 0) for path in biased
        )

    return (
        num_layers * size(QUERY, OUTPUT) // base.num_attention_heads,
        num_layers * size(KEY, VALUE) // base.num_key_value_heads,
        num_layers * size(GATE, UP, DOWN) // base.intermediate_size,
    )


def _config(model: PreTrainedModel, shape: Shape) -> PretrainedConfig:
    config = copy.deepcopy(model.config)
    config.num_attention_heads = shape.num_attention_heads
    config.num_key_value_heads = shape.num_key_value_heads
    config.intermediate_size = shape.intermediate_size
    config.head_dim = head_dim(model)
    config.use_cache = True
    config.validate()
    return config


def _is_loadable(model: PreTrainedModel, shape: Shape) -> bool:
    if shape == base_shape(model):
        return True
    try:
        _config(model, shape)
    except Exception:  # transformers raises validation classes of its own; whatever it refuses cannot be loaded
        return False
    return True


def check_prunable(model: PreTrainedModel, family: Family) -> None:
    """Raise a PatError if the layers of a model are not of the kind whose heads and channels can be cut."""
    names = {name for name, _ in model.named_parameters()}
    needed = [f"{family.layers}.0.{path}.weight" for path in (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)]
    missing = [name for name in needed if name not in names]
    norms = (f"{family.layers}.0.{norm}.weight" for norm in family.qk_norm)
    wide = [name for name in norms if model.get_parameter(name).numel() != head_dim(model)]
    if missing or wide:
        problem = f"has no {missing[0]}" if missing else f"normalises all heads together ({wide[0]})"
        raise PatError(
            f"Got a model of type {family.model_type!r}, which {problem}; this LLM-Pruner cuts models with separate "
            "q/k/v/o and gate/up/down projections in every layer. Leave the method out, or use another base."
        )
