"""Size and cost of one model, counted on a skeleton without weights: exact shapes, no memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from pat.loading import empty_model
from pat.nll import max_positions
from pat.shape import AXES, Shape
from pat.surgery.dense import shrink_config
from pat.surgery.describe import head_dim, map_of
from pat.surgery.layers import example_layers
from pat.surgery.residual import Linear, ResidualStream, model_tensors

CONTEXT = 2048
"""Number of tokens that costs are for unless somebody asks otherwise: the same in a plan and in a report."""

GROUPS = ("embedding", "head", "attention", "MLP", "norms")


@dataclass(frozen=True)
class GroupSize:
    """The size of one group of a model's tensors; a head tied to the embedding counts as embedding."""

    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class SettingCost:
    """The cost of a batch of equally long sequences; bytes are in the weights' dtype."""

    prefill_flops: float
    """FLOPs of reading all tokens: `2 * matmul parameters + 4 * heads * head_dim * layers * keys` for each of them,
    where keys is the mean number that a token attends to, and the head's product once for each sequence."""
    decode_bytes: float
    """Bytes read to generate one token for each sequence after the context: weights in use, and the caches."""
    kv_cache_bytes: int
    """Size of the caches of all sequences together."""


@dataclass(frozen=True)
class ModelCost:
    """The size of one model, and the cost of one sequence as long as the context; bytes are in the weights' dtype."""

    hidden_size: int
    tied: bool
    """Whether one matrix serves embedding and head."""
    groups: dict[str, GroupSize]
    """Sizes by `GROUPS`; their sum is exactly what the checkpoint's tensors hold."""
    total: GroupSize
    prefill_flops_per_token: float
    """FLOPs of reading the text, on average over its tokens."""
    decode_bytes_per_token: int
    """Bytes read to generate one token after the context: weights in use, and the cache."""
    kv_cache_bytes: int
    inference_bytes: int
    """Memory for weights and cache, without working memory."""


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and the roles of its parameters."""

    model: PreTrainedModel
    stream: ResidualStream
    dtype: torch.dtype

    def attention_widths(self) -> tuple[int, int]:
        """Return the summed width of all query heads, and of all key heads."""
        num_heads = self.model.config.num_attention_heads
        num_kv_heads = getattr(self.model.config, "num_key_value_heads", None) or num_heads
        size = head_dim(self.model)
        return num_heads * size, num_kv_heads * size

    def windows(self) -> list[int | None]:
        """Return the attention window of every layer, None where it sees everything."""
        # The cache is where transformers itself decides how much a layer has to remember.
        return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=self.model.config).layers]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every stored tensor by name; a tied head is not listed apart."""
        return {name: tensor.shape for name, tensor in model_tensors(self.model).items()}

    def groups(self) -> dict[str, list[str]]:
        """Return the names of all stored tensors by `GROUPS`."""
        stream = self.stream
        groups: dict[str, list[str]] = {group: [] for group in GROUPS}
        groups["embedding"].append(f"{stream.embedding}.weight")
        groups["head"] += stream.head.names if stream.head is not None else ()
        for branch in stream.branches:
            group = "attention" if branch.kind == "attention" else "MLP"
            groups[group] += [name for linear in (*branch.readers, branch.writer) for name in linear.names]
            groups["norms"] += [f"{norm}.weight" for norm in (branch.pre_norm, branch.post_norm) if norm is not None]
        groups["norms"] += [f"{stream.final_norm}.weight", *stream.untouched]
        return groups

    def linears(self) -> list[Linear]:
        """Return the linear maps of all layers; the head is not among them."""
        return [linear for branch in self.stream.branches for linear in (*branch.readers, branch.writer)]

    def num_in_use(self, batch_size: int = 1) -> float:
        """Return how many weights of the layers' linear maps multiply at least one token of a batch.

        Args:
            batch_size: number of tokens. Stacked experts count in so far as one of the tokens is routed to them, on
                average if the router has no preference.
        """
        shapes = self.shapes()

        def share(linear: Linear) -> float:
            if linear.weight != linear.path:
                return 1.0
            return float(1 - (1 - self.model.config.num_experts_per_tok / shapes[linear.weight][0]) ** batch_size)

        return sum(shapes[linear.weight].numel() * share(linear) for linear in self.linears())


def pruned_config(skeleton: Skeleton, shape: Shape, *, tied: bool) -> PretrainedConfig:
    """Return the configuration of the model that a shape comes to; which layers go is not known yet, how many is.

    Args:
        skeleton: the base model, without an adapter.
        shape: sizes to cut to.
        tied: whether one matrix is to serve embedding and head.
    """
    return shrink_config(
        skeleton.model.config,
        skeleton.stream.family,
        {axis.field: shape.pruned(axis.name) for axis in AXES.values() if shape.cuts(axis.name)},
        head_dim=head_dim(skeleton.model),
        tied=tied,
        keep_layers=example_layers(skeleton.stream, shape.pruned("layers")) if shape.cuts("layers") else None,
    )


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> Skeleton:
    """Build the model that a configuration describes.

    Raises:
        PatError: its family's record does not account for a parameter.
    """
    model = empty_model(config, dtype)
    return Skeleton(model, map_of(model), dtype)


def usual_context(config: PretrainedConfig) -> int:
    """Return the number of tokens that costs are for, or as many as the model can read."""
    return min(CONTEXT, max_positions(config) or CONTEXT)


def cost_of(skeleton: Skeleton, context: int) -> ModelCost:
    """Count a model's parameters by group, and what it takes to read and to generate text.

    Args:
        skeleton: the model.
        context: number of tokens that are read, or held in the cache.
    """
    tensors = model_tensors(skeleton.model)

    def size(names: Iterable[str]) -> GroupSize:
        chosen = [tensors[name] for name in names]
        num_parameters = sum(t.numel() for t in chosen if isinstance(t, nn.Parameter))  # buffers are none
        return GroupSize(num_parameters, sum(t.numel() * t.element_size() for t in chosen))

    total, setting = size(tensors), cost_at(skeleton, batch_size=1, context=context)
    return ModelCost(
        hidden_size=tensors[f"{skeleton.stream.final_norm}.weight"].numel(),
        tied=skeleton.stream.head is None,
        groups={group: size(names) for group, names in skeleton.groups().items()},
        total=total,
        prefill_flops_per_token=setting.prefill_flops / context,
        decode_bytes_per_token=round(setting.decode_bytes),
        kv_cache_bytes=setting.kv_cache_bytes,
        inference_bytes=total.num_bytes + setting.kv_cache_bytes,
    )


def cost_at(skeleton: Skeleton, *, batch_size: int, context: int) -> SettingCost:
    """Count what a batch of sequences takes that are as long as the context.

    Args:
        skeleton: the model.
        batch_size: number of sequences.
        context: number of tokens of each that are read, or held in its cache.
    """
    shapes, stream = skeleton.shapes(), skeleton.stream
    head = shapes[f"{stream.embedding}.weight" if stream.head is None else stream.head.weight].numel()
    query_width, key_width = skeleton.attention_widths()
    windows = [min(context, window or context) for window in skeleton.windows()]
    # A token sees itself and what comes before it, up to the window: 1, 2, ... and then the window's length.
    keys = sum((w * (w + 1) / 2 + (context - w) * w) / context for w in windows)
    kv_cache_bytes = 2 * batch_size * sum(windows) * key_width * skeleton.dtype.itemsize
    vectors = [*skeleton.groups()["norms"], *(linear.bias for linear in skeleton.linears() if linear.bias is not None)]
    weights = skeleton.num_in_use(batch_size) + head + sum(shapes[name].numel() for name in vectors)
    return SettingCost(
        prefill_flops=batch_size * (context * (2 * skeleton.num_in_use() + 4 * query_width * keys) + 2 * head),
        decode_bytes=weights * skeleton.dtype.itemsize + kv_cache_bytes,
        kv_cache_bytes=kv_cache_bytes,
    )
