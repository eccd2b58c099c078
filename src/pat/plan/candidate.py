"""One shape that a model may be pruned to, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from pat.file_sizes.predict import FileSizes
from pat.shape import Shape
from pat.surgery.costs import ModelCost
from pat.widths import legal_widths

NUM_NEIGHBOURS = 3
"""Number of legal widths shown on either side of the one taken."""


@dataclass(frozen=True)
class Candidate:
    """One width that the model may be pruned to, and what it comes to."""

    shape: Shape
    pruning_ratio: float
    """Share of all parameters that is cut."""
    nearby_widths: tuple[int, ...]
    """Legal hidden sizes around the one taken, ascending, itself included; none if it is not cut."""
    cost: ModelCost
    files: FileSizes
    prefill_speedup: float
    """Expected factor where arithmetic is the limit (reading text, large batches): ratio of FLOPs."""
    decode_speedup: float
    """Expected factor where memory is the limit (generating, batch size 1): ratio of bytes read."""


def candidate_of(
    shape: Shape,
    num_attention_heads: int,
    multiple_of: int | None,
    base: ModelCost,
    cost: ModelCost,
    files: FileSizes,
) -> Candidate:
    """Return a candidate for a shape.

    Args:
        shape: the sizes that are taken.
        num_attention_heads: of the pruned model.
        multiple_of: what a hidden size that is cut has to be a multiple of.
        base: costs of the base.
        cost: those of the pruned model.
        files: sizes of its files.
    """
    nearby: tuple[int, ...] = ()
    if shape.cuts("hidden"):
        legal = legal_widths(shape.size("hidden"), num_attention_heads, multiple_of=multiple_of)
        position = legal.index(shape.pruned("hidden"))
        nearby = tuple(legal[max(0, position - NUM_NEIGHBOURS) : position + NUM_NEIGHBOURS + 1])
    return Candidate(
        shape=shape,
        pruning_ratio=1 - cost.total.num_parameters / base.total.num_parameters,
        nearby_widths=nearby,
        cost=cost,
        files=files,
        prefill_speedup=base.prefill_flops_per_token / cost.prefill_flops_per_token,
        decode_speedup=base.decode_bytes_per_token / cost.decode_bytes_per_token,
    )
