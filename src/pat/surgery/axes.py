"""The spaces of a model that can be cut, and the cut of those inside a branch.

Every dimension of every weight lies in a space. The residual stream is one, `hidden`; another lies inside each branch,
between the rows of its readers and the columns of its writer: MLP channels, or attention heads (docs/adr/0015, 0016).
Cutting such a space is a selection, which commutes with everything that `pat.surgery.fold` does to the residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pat.budget import Prunable
from pat.families import Family, get_family
from pat.shape import AXES
from pat.surgery.adapted import AdaptedMatrix
from pat.surgery.describe import head_dim, map_of
from pat.surgery.layers import droppable_layers, layer_number
from pat.surgery.residual import ResidualStream


@dataclass(frozen=True)
class InnerCut:
    """The cut of the space inside one branch: what stays of it, and how the writer makes up for the rest.

    An entry of the space is an MLP channel, or a group of query heads with their key/value head. It may have several
    rows of a reader, and several columns of the writer, which lie one after another.
    """

    keep: Tensor
    """Which entries are kept, boolean `(size,)`."""
    reconstruction: Tensor | None = None
    """R `(dropped columns, kept columns)`, see `pat.method.inner`; None drops without a refit."""
    fused: tuple[int, ...] = (1, 1)
    """Rows of each entry in the matrices of a fused reader, in their order: gate and up, or query, key and value."""

    def rows(self, tensor: Tensor) -> Tensor:
        """Cut the first axis of a reader's parameter, or of one that has an entry for each query head."""
        size = len(self.keep)
        each = len(tensor) // size
        indices, start = [], 0
        for width in self.fused if each == sum(self.fused) else (each,):
            indices.append(start + _spread(self.keep, width).nonzero().squeeze(1))
            start += size * width
        return tensor.index_select(0, torch.cat(indices).to(tensor.device))

    def columns(self, tensor: Tensor) -> Tensor:
        """Cut the last axis: `W[:, K] + W[:, D] R`, in float32 or better if there is an R."""
        keep = _spread(self.keep, tensor.shape[-1] // len(self.keep)).to(tensor.device)
        if self.reconstruction is None:
            return tensor[..., keep]
        fine = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return fine[..., keep] + fine[..., ~keep] @ self.reconstruction.to(fine)


def cut_inner(
    weight: Callable[[str], Tensor | AdaptedMatrix], stream: ResidualStream, cuts: Mapping[str, InnerCut]
) -> Callable[[str], Tensor | AdaptedMatrix]:
    """Return a function like `weight` whose tensors are cut along the spaces inside the branches.

    Args:
        weight: returns a base parameter by name.
        stream: roles of the parameters.
        cuts: by the path of the branch's writer; a branch without an entry stays as it is.
    """
    rows: dict[str, InnerCut] = {}
    columns: dict[str, InnerCut] = {}
    for branch in stream.branches:
        if (cut := cuts.get(branch.writer.path)) is not None:
            rows |= {name: cut for reader in branch.inner for name in reader.names}
            rows |= dict.fromkeys(branch.per_head, cut)
            columns[branch.writer.weight] = cut

    def small(name: str) -> Tensor | AdaptedMatrix:
        given = weight(name)
        if name in rows:
            cut = rows[name].rows
            if isinstance(given, AdaptedMatrix):
                return replace(given, weight=cut(given.weight), up=cut(given.up))
            return cut(given)
        if name in columns:
            cut = columns[name].columns
            if isinstance(given, AdaptedMatrix):
                return replace(given, weight=cut(given.weight), down=cut(given.down))
            return cut(given)
        return given

    return small


def prunable(skeleton: PreTrainedModel) -> Prunable:
    """Return what a base model offers to be cut.

    Args:
        skeleton: a model without adapters and unquantised, of which shapes alone are looked at.

    Raises:
        PatError: see `map_of`.
    """
    stream, sizes = map_of(skeleton), sizes_of(skeleton.config, get_family(skeleton.config.model_type))
    num_pinned = droppable_layers(stream).count(False)
    queries = skeleton.config.num_attention_heads // sizes[AXES["heads"].field]
    return Prunable(
        sizes,
        _counter(skeleton, stream, sizes, num_pinned),
        queries,
        fewest_layers=max(1, num_pinned),
        obstacles=_obstacles(skeleton, stream, sizes),
    )


def sizes_of(config: PretrainedConfig, family: Family) -> dict[str, int]:
    """Return the sizes of a model along all axes, see `pat.shape.Shape`."""
    return {
        family.hidden_size_field: getattr(config, family.hidden_size_field),
        **({} if family.expert_parameters else {"intermediate_size": config.intermediate_size}),
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
    }


def _obstacles(skeleton: PreTrainedModel, stream: ResidualStream, sizes: Mapping[str, int]) -> dict[str, str]:
    obstacles = {}
    if stream.family.expert_parameters:
        obstacles["mlp"] = "this family has experts, whose MLPs cannot be cut yet"
    norms = [f"{stream.family.layers}.0.{norm}.weight" for norm in stream.family.qk_norm]
    spanning = [name for name in norms if skeleton.get_parameter(name).numel() != head_dim(skeleton)]
    if spanning:
        obstacles["heads"] = f"in this family one norm spans all heads ({spanning[0]}), so that none can go by itself"
    elif sizes["num_key_value_heads"] == 1:
        obstacles["heads"] = "this model has a single key/value head"
    if sizes["num_hidden_layers"] == 1:
        obstacles["layers"] = "this model has a single layer"
    return obstacles


def _counter(
    skeleton: PreTrainedModel, stream: ResidualStream, sizes: Mapping[str, int], num_pinned: int
) -> Callable[[Mapping[str, int]], int]:
    """Return a function that counts the parameters of the pruned model at some sizes, exactly."""
    readers = [reader for branch in stream.branches for reader in branch.readers]
    readers += [] if stream.head is None else [stream.head]
    off_stream = {*stream.untouched, *(reader.bias for reader in readers)}
    inner: dict[str, str] = {}
    for branch in stream.branches:
        names = [*(name for reader in branch.inner for name in reader.names), branch.writer.weight, *branch.per_head]
        inner |= dict.fromkeys(names, branch.axis)
    droppable = droppable_layers(stream)
    numbers: Counter[tuple[str, ...]] = Counter()
    for name, parameter in skeleton.named_parameters():
        number = layer_number(stream.family.layers, name)
        axes = [] if name in off_stream else ["hidden"]
        axes += [inner[name]] if name in inner else []
        axes += ["layers"] if number is not None and droppable[number] else []
        numbers[tuple(AXES[axis].field for axis in axes)] += parameter.numel()

    def count(pruned: Mapping[str, int]) -> int:
        total = 0
        for fields, number in numbers.items():
            for field in fields:
                fixed = num_pinned if field == "num_hidden_layers" else 0
                if field in sizes:  # not the channels of experts, which stay
                    number = number * (pruned[field] - fixed) // (sizes[field] - fixed)
            total += number
        return total

    return count


def _spread(keep: Tensor, width: int) -> Tensor:
    """Repeat each entry over its rows or columns."""
    return keep.repeat_interleave(width)
