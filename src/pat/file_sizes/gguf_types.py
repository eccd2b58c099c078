"""Metadata and tensors of a GGUF file, and which type llama.cpp's quantiser gives a tensor.

The rules are those of llama.cpp's `src/llama-quant.cpp` (build 11739); that they are is checked against files that it
has written. A row that is no multiple of a type's block falls back to a larger type, so that a pruned model with odd
rows can come out larger than its base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["u32", "f32", "bool", "str", "[str]", "[f32]", "[i32]", "[bool]"]

_WIDTHS = {"u32": 4, "f32": 4, "i32": 4, "bool": 1}


@dataclass(frozen=True)
class TensorType:
    """A type of a tensor in a GGUF file."""

    name: str
    block: int
    """Numbers in a block; rows are made of whole ones."""
    num_bytes: int
    """Bytes of a block."""

    def size(self, shape: Sequence[int]) -> int:
        """Return the bytes of a tensor with whole blocks."""
        return math.prod(shape) // self.block * self.num_bytes


TYPES = {
    kind.name: kind
    for kind in (
        TensorType("F32", 1, 4),
        TensorType("F16", 1, 2),
        TensorType("BF16", 1, 2),
        TensorType("Q4_0", 32, 18),
        TensorType("Q5_0", 32, 22),
        TensorType("Q5_1", 32, 24),
        TensorType("Q8_0", 32, 34),
        TensorType("Q4_K", 256, 144),
        TensorType("Q5_K", 256, 176),
        TensorType("Q6_K", 256, 210),
    )
}

FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Type of a row that is no multiple of 256; F16 where it is no multiple of 32 either."""


@dataclass(frozen=True)
class Quantization:
    """A type of GGUF file: the type of most matrices, and of those that get more bits."""

    name: str
    file_type: int
    """Its number in llama.cpp (`llama_ftype`)."""
    most: str
    more: dict[str, str] = field(default_factory=dict)
    """Types in the first and last eighth of the layers and every third one between, by role."""
    always: dict[str, str] = field(default_factory=dict)
    """Types by role in models of eight experts."""

    @property
    def is_plain(self) -> bool:
        """Whether every matrix has one type of floating-point numbers."""
        return TYPES[self.most].block == 1


_MORE = {"attn_v": "Q6_K", "attn_qkv": "Q6_K", "ffn_down": "Q6_K", "ffn_down_exps": "Q6_K"}
_EIGHT_EXPERTS = {"attn_v": "Q8_0", "attn_k": "Q8_0"}

QUANTIZATIONS = {
    kind.name: kind
    for kind in (
        Quantization("F32", 0, "F32"),
        Quantization("F16", 1, "F16"),
        Quantization("BF16", 32, "BF16"),
        Quantization("Q8_0", 7, "Q8_0"),
        Quantization("Q6_K", 18, "Q6_K", always=_EIGHT_EXPERTS),
        Quantization("Q5_K_M", 17, "Q5_K", more=_MORE, always=_EIGHT_EXPERTS),
        Quantization("Q4_K_M", 15, "Q4_K", more=_MORE, always=_EIGHT_EXPERTS | {"attn_output": "Q5_K"}),
        Quantization("Q4_0", 2, "Q4_0", always=_EIGHT_EXPERTS),
    )
}


@dataclass(frozen=True)
class Entry:
    """A piece of metadata."""

    key: str
    kind: Kind
    value: Any

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        head = 8 + len(self.key.encode()) + 4
        if self.kind == "str":
            return head + 8 + len(self.value.encode())
        if self.kind == "[str]":
            return head + 12 + sum(8 + len(item.encode()) for item in self.value)
        if self.kind.startswith("["):
            return head + 12 + len(self.value) * _WIDTHS[self.kind[1:-1]]
        return head + _WIDTHS[self.kind]


@dataclass(frozen=True)
class Placed:
    """A tensor of a GGUF file: its name, its shape and where it stands."""

    name: str
    shape: tuple[int, ...]
    """Shape as in torch, whose last dimension is a row of the file."""
    role: str
    """Its name without layer and suffix, such as `attn_v`."""
    layer: int | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it may be quantised: a weight of two dimensions or more that is no norm and no router."""
        return len(self.shape) > 1 and self.name.endswith("weight") and self.role != "ffn_gate_inp"


def type_of(tensor: Placed, kind: Quantization, *, num_layers: int, num_experts: int = 0, tied: bool) -> TensorType:
    """Return the type that a tensor has in a type of file.

    Args:
        tensor: the tensor.
        kind: the type of the file.
        num_layers: number of layers of the model.
        num_experts: number of its experts, 0 if there are none.
        tied: whether its embedding is the head as well, which is kept in more bits.
    """
    if not tensor.is_matrix:
        return TYPES["F32"]
    if kind.is_plain:
        return TYPES[kind.most]
    row, chosen = tensor.shape[-1], kind.most
    if tensor.role == "output" or (tied and tensor.role == "token_embd"):
        if row % TYPES[chosen].block:
            chosen = "Q8_0"
        elif chosen != "Q8_0":
            chosen = "Q6_K"
    elif num_experts == 8 and tensor.role in kind.always:
        chosen = kind.always[tensor.role]
    elif tensor.layer is not None and tensor.role in kind.more and _gets_more_bits(tensor.layer, num_layers):
        chosen = kind.more[tensor.role]
    if row % TYPES[chosen].block:
        chosen = FALLBACKS.get(chosen, chosen)
        if row % TYPES[chosen].block:
            chosen = "F16"
    return TYPES[chosen]


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
