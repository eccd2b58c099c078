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

from pat.families import Family, get_family
from pat.prunable import Prunable
from pat.shape import AXES
from pat.surgery.adapted import AdaptedMatrix
from pat.surgery.describe import head_dim, map_of
from pat.surgery.layers import droppable_layers, layer_number
from pat.surgery.residual import ResidualStream

EXPERTS_STEP = 8
"""Divides the number of channels that an expert keeps: the grouped kernel refuses rows that are not a multiple of 16
bytes, which are 8 numbers of 16 bits."""


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

    @property
    def num_kept(self) -> int:
        """Number of entries that are kept, of each expert where there are some."""
        return int(self.keep.flatten()[: self.keep.shape[-1]].sum())

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


@dataclass(frozen=True)
class ExpertsCut(InnerCut):
    """The cut of the spaces inside the experts of a layer, of which each keeps channels of its own.

    Shapes: `keep` is `(experts, size)`, with as many kept in each row, and `reconstruction` `(experts, dropped, kept)`.
    """

    def rows(self, tensor: Tensor) -> Tensor:
        """Cut the rows of a stacked reader, `(experts, n * size, d)`: one block on top of the other if it is fused."""
        size = self.keep.shape[-1]
        kept = _places(self.keep)
        index = torch.cat([start + kept for start in range(0, tensor.shape[1], size)], dim=1).unsqueeze(-1)
        return tensor.gather(1, index.to(tensor.device).expand(-1, -1, tensor.shape[-1]))

    def columns(self, tensor: Tensor) -> Tensor:
        """Cut the columns of the stacked writer, `(experts, d, size)`, as `InnerCut.columns` does each of its own."""
        kept, dropped = (_places(keep).unsqueeze(1).to(tensor.device) for keep in (self.keep, ~self.keep))
        kept, dropped = (index.expand(-1, tensor.shape[1], -1) for index in (kept, dropped))
        if self.reconstruction is None:
            return tensor.gather(-1, kept)
        fine = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return torch.baddbmm(fine.gather(-1, kept), fine.gather(-1, dropped), self.reconstruction.to(fine))


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
        mlp_step=EXPERTS_STEP if stream.family.expert_parameters else 1,
        fewest_layers=max(1, num_pinned),
        obstacles=_obstacles(skeleton, stream, sizes),
    )


def sizes_of(config: PretrainedConfig, family: Family) -> dict[str, int]:
    """Return the sizes of a model along all axes, see `pat.shape.Shape`."""
    return {
        family.hidden_size_field: getattr(config, family.hidden_size_field),
        AXES["mlp"].field: getattr(config, family.mlp_field),
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
    }


def _obstacles(skeleton: PreTrainedModel, stream: ResidualStream, sizes: Mapping[str, int]) -> dict[str, str]:
    obstacles = {}
    if stream.family.expert_parameters and not any(branch.has_experts for branch in stream.branches):
        obstacles["mlp"] = "in this family the channels of experts can be cut, and this model has no experts"
    elif stream.family.expert_parameters and sizes[AXES["mlp"].field] <= EXPERTS_STEP:
        obstacles["mlp"] = (
            f"an expert keeps a multiple of {EXPERTS_STEP} channels, and these have {sizes[AXES['mlp'].field]}"
        )
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
        if branch.axis is not None:
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
                number = number * (pruned[field] - fixed) // (sizes[field] - fixed)
            total += number
        return total

    return count


def _places(keep: Tensor) -> Tensor:
    """Return which entries each row keeps, ascending, `(rows, kept)`; all rows keep equally many."""
    return keep.nonzero()[:, 1].view(len(keep), -1)


def _spread(keep: Tensor, width: int) -> Tensor:
    """Repeat each entry over its rows or columns."""
    return keep.repeat_interleave(width)
