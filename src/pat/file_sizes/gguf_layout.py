"""The layout of a GGUF file, byte by byte, before any weight is read: metadata, tensors and their types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pat.errors import PatError
from pat.file_sizes.gguf_families import GgufFamily, gguf_family
from pat.file_sizes.gguf_types import Entry, Kind, Placed, Quantization, TensorType, type_of
from pat.surgery.costs import Skeleton
from pat.surgery.residual import Linear

ALIGNMENT = 32
"""The data of every tensor begins at a multiple of so many bytes."""

_ROLES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate": "ffn_gate_inp",
    "router": "ffn_gate_inp",
}
"""Names of readers by the last part of their path; a fused `gate_up_proj` is `ffn_up`, or two stacks of experts."""


@dataclass(frozen=True)
class GgufTensor(Placed):
    """A tensor of a GGUF file, and what it is made of."""

    source: str = ""
    """Name of the model's tensor."""
    half: int | None = None
    """Which half of the rows of each expert, where gate and up are one matrix."""
    num_heads: int | None = None
    """Number of heads whose channels are reordered, see `GgufFamily.interleaved`."""
    offset: float = 0.0
    """Number that is added to each value: norms of llama.cpp multiply by their weight alone."""
    values: tuple[float, ...] | None = None
    """Values of a tensor that no model stores."""


@dataclass(frozen=True)
class GgufLayout:
    """A file before it has weights."""

    architecture: str
    metadata: tuple[Entry, ...]
    tensors: tuple[GgufTensor, ...]
    num_layers: int
    num_experts: int
    tied: bool

    def type_of(self, tensor: Placed, kind: Quantization) -> TensorType:
        """Return the type that a tensor has in a type of file."""
        return type_of(tensor, kind, num_layers=self.num_layers, num_experts=self.num_experts, tied=self.tied)

    def num_bytes(self, kind: Quantization) -> int:
        """Return the size of the file."""
        size = 24 + sum(entry.num_bytes for entry in self.metadata)
        size += sum(8 + len(t.name.encode()) + 4 + 8 * len(t.shape) + 4 + 8 for t in self.tensors)
        data = sum(_aligned(self.type_of(tensor, kind).size(tensor.shape)) for tensor in self.tensors)
        return _aligned(size) + data

    def odd_rows(self, kind: Quantization) -> dict[int, int]:
        """Return how many numbers stand in rows that fall back to a larger type, by the rows' length."""
        found: dict[int, int] = {}
        for tensor in self.tensors:
            if tensor.is_matrix and not kind.is_plain and self.type_of(tensor, kind) is not self._wanted(tensor, kind):
                found[tensor.shape[-1]] = found.get(tensor.shape[-1], 0) + math.prod(tensor.shape)
        return found

    def _wanted(self, tensor: GgufTensor, kind: Quantization) -> TensorType:
        """Return the type that a tensor would have if its rows were a multiple of every block."""
        return self.type_of(replace(tensor, shape=(*tensor.shape[:-1], 256)), kind)


def layout_of(skeleton: Skeleton, vocabulary: Sequence[Entry], *, name: str, kind: Quantization) -> GgufLayout:
    """Return what a model's GGUF file holds.

    Args:
        skeleton: the model; weights are not needed.
        vocabulary: metadata of its tokenizer; empty for a file that reads token ids alone.
        name: name of the model in the file.
        kind: what the file says it is.

    Raises:
        PatError: llama.cpp cannot run such a model, or not as transformers does.
    """
    config = skeleton.model.config
    family = gguf_family(config.model_type)
    head_size = skeleton.attention_widths()[0] // config.num_attention_heads
    if family.derives_head_size and head_size * config.num_attention_heads != config.hidden_size:
        if family.stand_in is None:
            raise PatError(
                f"Got a {family.model_type} model whose heads ({config.num_attention_heads} of {head_size}) do not "
                f"make up its hidden size {config.hidden_size}; llama.cpp takes hidden size / heads for the size of a "
                "head. Use --format onnx, or prune with --axes mlp or layers."
            )
        family = replace(family, architecture=family.stand_in, interleaved=True)
    _check(family, config, head_size)
    if family.tied_only and skeleton.stream.head is not None:
        raise PatError(f"Got a {family.model_type} model with a head of its own, which llama.cpp has no place for.")
    arch = family.architecture
    tensors = _tensors(skeleton, family, head_size)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    metadata = [
        Entry("general.architecture", "str", arch),
        Entry("general.name", "str", name),
        Entry("general.file_type", "u32", kind.file_type),
        Entry("general.quantization_version", "u32", 2),
        *(Entry(f"{arch}.{key}", form, value) for key, form, value in _numbers(family, config, head_size, experts)),
        *vocabulary,
    ]
    return GgufLayout(
        architecture=arch,
        metadata=tuple(metadata),
        tensors=tensors,
        num_layers=config.num_hidden_layers,
        num_experts=experts,
        tied=skeleton.stream.head is None,
    )


def _check(family: GgufFamily, config: Any, head_size: int) -> None:
    """Refuse what llama.cpp would run as another function, without saying so."""
    kind = f"Got a {family.model_type} model"
    types = list(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in types and config.sliding_window is not None:
        if family.windows is None:
            raise PatError(f"{kind} some of whose layers see a window; llama.cpp knows none in this family.")
        if not family.writes_windows and types != _every(family.windows, len(types)):
            raise PatError(f"{kind} whose windows do not alternate; llama.cpp takes every other layer to have one.")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    is_other = config.num_hidden_layers == family.other_scale_at
    if family.scale_of_head and scalar is not None and (scalar != head_size or is_other):
        raise PatError(
            f"{kind} with query_pre_attn_scalar={scalar:g}; llama.cpp takes the size of a head, {head_size} (of the "
            "largest models hidden size / heads). Use --format onnx."
        )
    rotated = getattr(config, "no_rope_layers", None)
    if (
        family.unrotated
        and rotated
        and [bool(n) for n in rotated] != [(index + 1) % family.unrotated != 0 for index in range(len(rotated))]
    ):
        raise PatError(f"{kind} in which not every {family.unrotated}th layer is without a rotary embedding.")
    if (unlike := family.unlike(config)) is not None:
        name, given, expected = unlike
        raise PatError(
            f"{kind} with {name}={given!r}; llama.cpp runs every such model as with {expected}. Use --format onnx."
        )
    for index, rope in enumerate(_ropes(config)):
        # The file has no place for a scaling of the layers that see a window.
        if rope.get("rope_type", "default") not in (("default",) if index else ("default", "llama3", "linear")):
            raise PatError(f"{kind} with a rotary embedding of type {rope['rope_type']!r}; use --format onnx.")
        if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0 and not family.rotates_part:
            raise PatError(
                f"{kind} that rotates {part:g} of each head; llama.cpp rotates all of it. Use --format onnx."
            )


def _every(period: int, num_layers: int) -> list[str]:
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of the rotary embedding: of all layers, or of full and sliding attention."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [rope[name] for name in ("full_attention", "sliding_attention") if name in rope]
    return nested or [rope]


def _numbers(family: GgufFamily, config: Any, head_size: int, experts: int) -> list[tuple[str, Kind, Any]]:
    window = getattr(config, "sliding_window", None)
    types = list(getattr(config, "layer_types", None) or ())
    context = config.max_position_embeddings
    if window is not None and family.windows is None and "full_attention" not in types:
        context = min(context, window)  # llama.cpp sees everything, which is the same function up to the window
    ropes = _ropes(config)
    rotated = int(head_size * (ropes[0].get("partial_rotary_factor") or 1.0))
    numbers: list[tuple[str, Kind, Any]] = [
        ("context_length", "u32", context),
        ("embedding_length", "u32", config.hidden_size),
        ("block_count", "u32", config.num_hidden_layers),
        ("feed_forward_length", "u32", config.intermediate_size),
        ("attention.head_count", "u32", config.num_attention_heads),
        ("attention.head_count_kv", "u32", config.num_key_value_heads),
        ("attention.layer_norm_rms_epsilon", "f32", config.rms_norm_eps),
        ("attention.key_length", "u32", head_size),
        ("attention.value_length", "u32", head_size),
        ("rope.dimension_count", "u32", rotated),
        ("rope.freq_base", "f32", float(ropes[0].get("rope_theta", 10_000.0))),
        ("vocab_size", "u32", config.vocab_size),
    ]
    if ropes[0].get("rope_type") == "linear":
        numbers += [("rope.scaling.type", "str", "linear"), ("rope.scaling.factor", "f32", float(ropes[0]["factor"]))]
    if family.windows is not None and window is not None and "sliding_attention" in types:
        numbers.append(("attention.sliding_window", "u32", window))
        if family.writes_windows:
            pattern = [kind == "sliding_attention" for kind in types]
            numbers.append(("attention.sliding_window_pattern", "[bool]", pattern))
        if len(ropes) > 1:
            numbers.append(("rope.freq_base_swa", "f32", float(ropes[1]["rope_theta"])))
    if experts:
        numbers += [("expert_count", "u32", experts), ("expert_used_count", "u32", config.num_experts_per_tok)]
    for key, field in family.fields.items():
        value = getattr(config, field, None)
        if value is not None:
            numbers.append((key, "u32" if isinstance(value, int) and key.endswith("length") else "f32", value))
    return numbers


def _tensors(skeleton: Skeleton, family: GgufFamily, head_size: int) -> tuple[GgufTensor, ...]:
    stream, config, shapes = skeleton.stream, skeleton.model.config, skeleton.shapes()
    record, offset = stream.family, stream.family.gain_offset
    found: list[GgufTensor] = []
    taken: set[str] = set()

    def add(source: str, role: str, layer: int | None = None, *, suffix: str = "weight", **how: Any) -> None:
        shape = tuple(shapes[source])
        if how.get("half") is not None:
            shape = (shape[0], shape[1] // 2, shape[2])
        name = f"{role}.{suffix}" if layer is None else f"blk.{layer}.{role}.{suffix}"
        found.append(GgufTensor(name, shape, role, layer, source=source, **how))
        taken.add(source)

    def add_linear(linear: Linear, role: str, layer: int) -> None:
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(role)
        how = {"num_heads": heads} if heads and family.interleaved else {}
        add(linear.weight, role, layer, **how)
        if linear.bias is not None:
            if role in family.no_bias:
                raise PatError(
                    f"Got a {family.model_type} model with a bias in {linear.path}, which llama.cpp has no place for. "
                    "Use --format onnx."
                )
            add(linear.bias, role, layer, suffix="bias", **how)

    add(f"{stream.embedding}.weight", "token_embd")
    for branch in stream.branches:
        layer = int(branch.site.removeprefix(f"{record.layers}.").split(".")[0])
        attention = branch.kind == "attention"
        if branch.pre_norm is not None:
            add(f"{branch.pre_norm}.weight", "attn_norm" if attention else family.ffn_norm, layer, offset=offset)
        for reader in branch.readers:
            last = reader.path.rsplit(".", 1)[-1]
            if last != "gate_up_proj":
                add_linear(reader, _ROLES[last], layer)
            elif len(shapes[reader.weight]) == 2:
                add_linear(reader, "ffn_up", layer)
            else:
                add(reader.weight, "ffn_gate_exps", layer, half=0)
                add(reader.weight, "ffn_up_exps", layer, half=1)
        stacked = len(shapes[branch.writer.weight]) == 3
        add_linear(branch.writer, "attn_output" if attention else "ffn_down_exps" if stacked else "ffn_down", layer)
        if attention:
            for path, role in zip(record.qk_norm, ("attn_q_norm", "attn_k_norm"), strict=False):
                source = f"{record.layers}.{layer}.{path}.weight"
                if source in shapes:
                    add(source, role, layer, offset=offset)
        if branch.post_norm is not None:
            add(
                f"{branch.post_norm}.weight",
                "post_attention_norm" if attention else "post_ffw_norm",
                layer,
                offset=offset,
            )
    add(f"{stream.final_norm}.weight", "output_norm", offset=offset)
    if stream.head is not None:
        add(stream.head.weight, "output")
    if left := sorted(set(shapes) - taken):
        raise PatError(f"Got a {family.model_type} model with tensors that GGUF has no place for, such as {left[0]}.")
    if (rope := _ropes(config)[0]).get("rope_type") == "llama3":
        factors = _llama3_factors(rope, head_size)
        found.append(GgufTensor("rope_freqs.weight", (len(factors),), "rope_freqs", values=factors))
    return tuple(found)


def _llama3_factors(rope: dict[str, Any], head_size: int) -> tuple[float, ...]:
    """Return what the frequencies are divided by, as transformers' rotary embedding of type llama3 has it."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return tuple((1 / ((1 - smooth) / factor + smooth)).tolist())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
