"""Size and cost of one model, counted on a skeleton without weights: exact shapes, no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from pat.errors import PatError
from pat.families import Family
from pat.surgery.residual import Linear, ResidualBranch, ResidualStream, map_residual_stream, stored_tensors

GROUPS = ("embedding", "head", "attention", "MLP", "norms")


@dataclass(frozen=True)
class Size:
    """How much of a model one group of parameters is; a head tied to the embedding counts as embedding."""

    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class ModelCost:
    """What one model is and costs; bytes are of its weights' dtype."""

    hidden_size: int
    head_dim: int
    tied: bool
    groups: dict[str, Size]
    """By `GROUPS`; their sum is exactly what the checkpoint's tensors hold."""
    num_matmul_parameters: int
    """Weights that multiply every token: all linear maps and the head, of experts only the routed share."""
    prefill_flops_per_token: float
    """Of reading a text as long as the context, see `SettingCost.prefill_flops`, on average over its tokens."""
    kv_cache_bytes: int
    """Of one sequence as long as the context."""
    decode_bytes_per_token: int
    """Read from memory to generate one token after the context, at batch size 1: weights in use and the cache."""

    @property
    def total(self) -> Size:
        """All groups together."""
        sizes = self.groups.values()
        return Size(sum(size.num_parameters for size in sizes), sum(size.num_bytes for size in sizes))

    @property
    def inference_bytes(self) -> int:
        """Memory for generating one sequence up to the context: weights and cache, without working memory."""
        return self.total.num_bytes + self.kv_cache_bytes


@dataclass(frozen=True)
class SettingCost:
    """What a batch of equally long sequences takes; bytes are of the weights' dtype."""

    prefill_flops: float
    """For all tokens `2 * matmul parameters + 4 * heads * head_dim * layers * keys`, keys being the mean number that a
    token attends to; the head's product once a sequence, for the token to come. The embedding's lookup is none."""
    decode_bytes: float
    """Read from memory to generate one token for each sequence after the context: weights in use, and the caches."""
    kv_cache_bytes: int
    """Of all sequences together."""


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and the roles of its parameters."""

    model: PreTrainedModel
    stream: ResidualStream
    dtype: torch.dtype

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return int(cast(int, self.model.get_submodule(f"{self.stream.family.layers}.0.self_attn").head_dim))

    def attention_widths(self) -> tuple[int, int]:
        """Return the summed width of all query heads, and of all key heads."""
        num_heads = self.model.config.num_attention_heads
        num_kv_heads = getattr(self.model.config, "num_key_value_heads", None) or num_heads
        return num_heads * self.head_dim, num_kv_heads * self.head_dim

    def windows(self) -> list[int | None]:
        """Return the attention window of every layer, None where it sees everything."""
        # The cache is where transformers itself decides how much a layer has to remember.
        return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=self.model.config).layers]

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of every stored tensor by name; a tied head is not listed apart."""
        return {name: tensor.shape for name, tensor in stored_tensors(self.model).items()}

    @property
    def head(self) -> Linear:
        """The linear map that gives the logits, tied or not."""
        return self.stream.head or Linear(self.stream.embedding, f"{self.stream.embedding}.weight", None)

    def linears(self) -> list[Linear]:
        """Return the linear maps of all layers, the head not among them."""
        return [linear for branch in self.stream.branches for linear in (*branch.readers, branch.writer)]

    def num_in_use(self, batch_size: int = 1) -> float:
        """Return how many weights of the layers' linear maps multiply at least one token of a batch.

        Args:
            batch_size: tokens in the batch; of stacked experts those count that one of them is routed to, on average if
                the router has no preference.
        """
        shapes = self.shapes()

        def share(linear: Linear) -> float:
            if linear.weight != linear.path:
                return 1.0
            return float(1 - (1 - self.model.config.num_experts_per_tok / shapes[linear.weight][0]) ** batch_size)

        return sum(shapes[linear.weight].numel() * share(linear) for linear in self.linears())


def build_skeleton(config: PretrainedConfig, family: Family, dtype: torch.dtype) -> Skeleton:
    """Build the model that a configuration describes on the meta device, where tensors have shapes only.

    Raises:
        PatError: transformers cannot build it, or its family's record does not account for a parameter.
    """
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # what is counted is the model that the weights stand for
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, dtype=dtype)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise PatError(
            f"transformers cannot build a {family.model_type} model from this configuration: "
            f"{' '.join(str(error).split())}"
        ) from error
    stream = map_residual_stream(family, stored_tensors(model), tied=bool(config.tie_word_embeddings))
    return Skeleton(cast(PreTrainedModel, model), stream, dtype)


def cost_of(skeleton: Skeleton, context: int) -> ModelCost:
    """Count a model's parameters by group, and what it takes to read and to generate text.

    Args:
        skeleton: the model.
        context: tokens of the text read, or held in the cache.
    """
    stream, parameters = skeleton.stream, stored_tensors(skeleton.model)
    setting = cost_at(skeleton, batch_size=1, context=context)
    return ModelCost(
        hidden_size=parameters[f"{stream.final_norm}.weight"].numel(),
        head_dim=skeleton.head_dim,
        tied=stream.head is None,
        groups={group: _size(parameters, names) for group, names in _names_by_group(stream).items()},
        num_matmul_parameters=round(skeleton.num_in_use()) + parameters[skeleton.head.weight].numel(),
        prefill_flops_per_token=setting.prefill_flops / context,
        kv_cache_bytes=setting.kv_cache_bytes,
        decode_bytes_per_token=round(setting.decode_bytes),
    )


def cost_at(skeleton: Skeleton, *, batch_size: int, context: int) -> SettingCost:
    """Count what a batch of sequences takes that are as long as the context.

    Args:
        skeleton: the model.
        batch_size: sequences.
        context: tokens of each that are read, or held in its cache.
    """
    shapes = skeleton.shapes()
    head = shapes[skeleton.head.weight].numel()
    query_width, key_width = skeleton.attention_widths()
    windows = skeleton.windows()
    keys = sum(_mean_visible(context, window) for window in windows)
    element = skeleton.dtype.itemsize
    cached = sum(min(context, window or context) for window in windows)
    kv_cache_bytes = 2 * batch_size * cached * key_width * element
    vectors = sum(shapes[name].numel() for name in _names_by_group(skeleton.stream)["norms"]) + sum(
        shapes[linear.bias].numel() for linear in skeleton.linears() if linear.bias is not None
    )
    return SettingCost(
        prefill_flops=batch_size * (context * (2 * skeleton.num_in_use() + 4 * query_width * keys) + 2 * head),
        decode_bytes=(skeleton.num_in_use(batch_size) + head + vectors) * element + kv_cache_bytes,
        kv_cache_bytes=kv_cache_bytes,
    )


def _names_by_group(stream: ResidualStream) -> dict[str, list[str]]:
    """Distribute all parameter names over `GROUPS`."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    groups["embedding"].append(f"{stream.embedding}.weight")
    groups["head"] += stream.head.names if stream.head is not None else ()
    for branch in stream.branches:
        group = "attention" if branch.writer.path.endswith(stream.family.attention.writer) else "MLP"
        groups[group] += [name for linear in (*branch.readers, branch.writer) for name in linear.names]
        groups["norms"] += _norms(branch)
    groups["norms"] += [f"{stream.final_norm}.weight", *stream.untouched]
    return groups


def _norms(branch: ResidualBranch) -> list[str]:
    return [f"{norm}.weight" for norm in (branch.pre_norm, branch.post_norm) if norm is not None]


def _size(tensors: Mapping[str, Tensor], names: list[str]) -> Size:
    chosen = [tensors[name] for name in names]
    num_parameters = sum(tensor.numel() for tensor in chosen if isinstance(tensor, nn.Parameter))  # and no buffer
    return Size(num_parameters, sum(tensor.numel() * tensor.element_size() for tensor in chosen))


def _mean_visible(length: int, window: int | None) -> float:
    """Return how many keys a token attends to, itself included, on average over a causal text of `length` tokens."""
    w = min(length, window or length)
    return (w * (w + 1) / 2 + (length - w) * w) / length
