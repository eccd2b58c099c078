"""Size of a model whose linear layers have 4 bits, as AWQ and GPTQ write them and vLLM's Marlin kernels run them.

Of vLLM 0.32 (`marlin_utils.py`, `auto_awq.py`): groups of 32, 64 or 128 inputs that share a scale have to divide the
inputs, 8 outputs are packed into one number, and a layer that is not made of whole tiles is padded with zeros, which is
slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pat.surgery.costs import Skeleton

GROUP_SIZES = (128, 64, 32)
"""Numbers of inputs that share a scale, best first."""

PACKED = 8
"""Outputs in one number of 32 bits."""

TILES = ((64, 128), (128, 64))
"""Numbers of outputs and inputs of which a layer's are multiples, in one way or the other."""

EXPERT_HIDDEN_SIZE = 128
"""The hidden size of stacked experts has to be a multiple of this; it is not padded."""


@dataclass(frozen=True)
class Int4Size:
    """The size of a checkpoint with linear layers and experts in 4 bits, the rest in bfloat16."""

    num_bytes: int
    group_size: int
    """Number of inputs that share a scale (float16) and a zero (4 bits): of 128, 64 and 32 the one with the smallest
    file, for every layer the same."""
    odd_rows: dict[str, float]
    """Share of all parameters in layers that stay in bfloat16, since the group does not divide their inputs or 8 their
    outputs, by the number of inputs."""
    off_tiles: float
    """Share of all parameters in layers in 4 bits that Marlin pads, or, of experts, leaves to other kernels."""


@dataclass(frozen=True)
class _Layer:
    """Matrices that vLLM multiplies at once, such as query, key and value."""

    num_inputs: int
    num_outputs: tuple[int, ...]
    num_experts: int | None

    @property
    def size(self) -> int:
        return self.num_inputs * sum(self.num_outputs) * (self.num_experts or 1)

    def fits(self, group: int) -> bool:
        return self.num_inputs % group == 0 and all(number % PACKED == 0 for number in self.num_outputs)

    def saved(self, group: int) -> float:
        """Return the bytes by which it is smaller than in bfloat16."""
        return self.size * (2 - 0.5 - 2.5 / group) if self.fits(group) else 0

    def has_tiles(self, hidden_size: int) -> bool:
        outputs = sum(self.num_outputs)
        whole = any(outputs % most == 0 and self.num_inputs % least == 0 for most, least in TILES)
        return whole and (self.num_experts is None or hidden_size % EXPERT_HIDDEN_SIZE == 0)


def int4_size(skeleton: Skeleton) -> Int4Size:
    """Return the size of a model's 4-bit checkpoint, without its metadata."""
    total = sum(math.prod(shape) for shape in skeleton.shapes().values())
    layers = list(_layers(skeleton))
    group = max(GROUP_SIZES, key=lambda size: sum(layer.saved(size) for layer in layers))  # of equals the largest
    odd: dict[str, float] = {}
    off_tiles = 0.0
    hidden_size = skeleton.model.config.hidden_size
    for layer in layers:
        if not layer.fits(group):
            odd[str(layer.num_inputs)] = odd.get(str(layer.num_inputs), 0) + layer.size / total
        elif not layer.has_tiles(hidden_size):
            off_tiles += layer.size / total
    saved = sum(layer.saved(group) for layer in layers)
    return Int4Size(num_bytes=round(2 * total - saved), group_size=group, odd_rows=odd, off_tiles=off_tiles)


def _layers(skeleton: Skeleton) -> Iterator[_Layer]:
    shapes = skeleton.shapes()
    for branch in skeleton.stream.branches:
        for linears in (branch.inner, (branch.writer,)):
            sizes = [shapes[linear.weight] for linear in linears]
            experts = sizes[0][0] if len(sizes[0]) == 3 else None
            yield _Layer(sizes[0][-1], tuple(size[-2] for size in sizes), experts)
