"""The cut of whole layers: which may go, what the others are then called, and what a configuration lists of them.

In families with layers of several kinds (experts in some of them) only those of the most frequent kind may go, so that
the size of the pruned model does not depend on which ones do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pat.families import DENSE_LAYERS, FIRST_LAYERS, LAYER_LISTS, SPARSE_STEP
from pat.surgery.residual import ResidualBranch, ResidualStream

T = TypeVar("T")


@dataclass(frozen=True)
class LayerCut:
    """The layers that stay, and the names of what is in them."""

    path: str
    """Path of the module that holds the layers."""
    keep: tuple[int, ...]
    """Numbers of the layers that stay, ascending."""
    num_layers: int
    """Number of layers of the base model."""

    @property
    def cuts(self) -> bool:
        """Whether layers go."""
        return len(self.keep) < self.num_layers

    def renamed(self, name: str) -> str | None:
        """Return what a module or parameter is called in the pruned model, None if its layer goes."""
        number = layer_number(self.path, name)
        if number is None:
            return name
        if number not in self.keep:
            return None
        first = f"{self.path}.{number}"
        return f"{self.path}.{self.keep.index(number)}{name[len(first) :]}"

    def renamed_keys(self, values: Mapping[str, T]) -> dict[str, T]:
        """Return values by names of the pruned model; those of layers that go are left out."""
        return {new: value for name, value in values.items() if (new := self.renamed(name)) is not None}

    def renamed_parts(self, names: Sequence[str] | None) -> list[str] | None:
        """Return parts of names as users give them, with the new numbers of layers; those that go are left out."""
        if names is None:
            return None
        holder = self.path.rpartition(".")[2]
        whole = {name: re.sub(rf"^(.*\.)?{holder}\.(?=\d)", f"{self.path}.", name) for name in names}
        found = {name: self.renamed(full) for name, full in whole.items()}
        return [name if found[name] == whole[name] else new for name, new in found.items() if new is not None]

    def stream(self, stream: ResidualStream) -> ResidualStream:
        """Return the residual stream through the layers that stay, with the names of the base model."""
        return replace(
            stream,
            branches=tuple(b for b in stream.branches if self.renamed(b.writer.path) is not None),
            untouched=tuple(name for name in stream.untouched if self.renamed(name) is not None),
        )


def layer_number(path: str, name: str) -> int | None:
    """Return the number of the layer that a module or parameter belongs to, None if to none."""
    before, _, rest = name.partition(f"{path}.")
    number = rest.partition(".")[0]
    return int(number) if not before and number.isdigit() else None


def layers_of(stream: ResidualStream) -> list[list[ResidualBranch]]:
    """Return the branches of each layer."""
    layers: dict[int, list[ResidualBranch]] = {}
    for branch in stream.branches:
        number = layer_number(stream.family.layers, branch.writer.path)
        assert number is not None, "a branch lies in a layer"
        layers.setdefault(number, []).append(branch)
    return [layers[number] for number in sorted(layers)]


def droppable_layers(stream: ResidualStream) -> list[bool]:
    """Tell of each layer whether it may go: whether it is of the most frequent kind, of equals the first one."""
    kinds = []
    for number, branches in enumerate(layers_of(stream)):
        names = (name for branch in branches for linear in (*branch.readers, branch.writer) for name in linear.names)
        kinds.append(tuple(name.removeprefix(f"{stream.family.layers}.{number}.") for name in names))
    ((most_frequent, _),) = Counter(kinds).most_common(1)
    return [kind == most_frequent for kind in kinds]


def example_layers(stream: ResidualStream, num_kept: int) -> tuple[int, ...]:
    """Return the numbers of layers that might stay, for a plan: the last ones that may go do."""
    droppable = [number for number, may_go in enumerate(droppable_layers(stream)) if may_go]
    num_layers = len(layers_of(stream))
    gone = set(droppable[len(droppable) - (num_layers - num_kept) :])
    return tuple(number for number in range(num_layers) if number not in gone)


def cut_layer_fields(config: Any, keep: Sequence[int]) -> None:
    """Cut everything that a configuration says of its layers, in place.

    Args:
        config: of the base model.
        keep: numbers of the layers that stay, ascending.
    """
    num_layers = config.num_hidden_layers
    for name in LAYER_LISTS:
        if isinstance(listed := getattr(config, name, None), list) and len(listed) == num_layers:
            setattr(config, name, [listed[number] for number in keep])
    if (first := getattr(config, FIRST_LAYERS, None)) is not None:
        setattr(config, FIRST_LAYERS, sum(number < first for number in keep))
    if (dense := getattr(config, DENSE_LAYERS, None)) is not None:
        step = getattr(config, SPARSE_STEP, 1)
        kept = [place for place, number in enumerate(keep) if number in dense or (number + 1) % step]
        setattr(config, DENSE_LAYERS, kept)
        setattr(config, SPARSE_STEP, 1)
    config.num_hidden_layers = len(keep)
