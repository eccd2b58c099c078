"""The cells of the contract suite: which family is trained with which options.

All combinations would be thousands. Instead every *pair* occurs in some cell: each family with each option, and the
options among themselves. The cells are chosen by a greedy search without any chance in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tiny_models import FAMILIES, WITHOUT_BIAS, shallow

from pat.surgery.axes import prunable

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": False},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dense": {"operator_rank": "dense"},
    "frozen": {"mask": "frozen"},
    "bias": {"lora_bias": True},  # on the layers that have a bias
    "saved": {},  # all norms, and an end of the stream (modules_to_save)
    "4bit": {},  # on a base quantised by bitsandbytes
}

FACTORS: dict[str, tuple[str, ...]] = {
    "family": FAMILIES,
    "form": ("tied-auto", "untied-none", "untied-auto", "tied-none"),  # head and rotation: the four forms of a merge
    "adapter": tuple(ADAPTERS),
    "path": ("compacted", "streamed", "resumed", "reloaded"),
    "axes": ("hidden", "mlp", "hidden+mlp", "layers", "heads", "mlp+layers", "hidden+heads", "mlp+heads"),
}

OBSTACLES = {family: frozenset(prunable(shallow(family, tied=True)).obstacles) for family in FAMILIES}
"""Axes that cannot be cut, by family."""


@dataclass(frozen=True)
class Cell:
    """One training, and what is asked of it."""

    family: str
    form: str
    adapter: str
    path: str
    """What is done with the trained model besides merging it."""
    axes: str
    """Axes that are cut."""

    def __str__(self) -> str:
        return "-".join((self.family, self.form, self.adapter, self.path, self.axes))

    def cuts(self, axis: str) -> bool:
        return axis in self.axes.split("+")

    @property
    def tied(self) -> bool:
        return self.form.startswith("tied")

    @property
    def rotation(self) -> str:
        return self.form.rpartition("-")[2]

    @property
    def quantised(self) -> bool:
        return self.adapter == "4bit"


def possible(row: Row) -> bool:
    """Tell whether the method allows a combination, of which some levels may be open."""
    axes = row.get("axes", "hidden").split("+")
    if "family" in row and OBSTACLES[row["family"]].intersection(axes):
        return False
    if "hidden" not in axes and row.get("adapter") == "dense":
        return False  # without a cut of the stream there are no operators
    quantised = row.get("adapter") == "4bit"
    if quantised and row.get("path") in ("compacted", "streamed"):
        return False  # refused; merged in memory
    return not (row.get("adapter") == "bias" and row.get("family") in WITHOUT_BIAS)


def pairs(first: str, second: str, levels: Iterable[str] = ()) -> list[Pair]:
    """Return the possible pairs of the levels of two factors, of the second one only `levels` if they are given."""
    rows = ({first: a, second: b} for a, b in itertools.product(FACTORS[first], levels or FACTORS[second]))
    return [frozenset(row.items()) for row in rows if possible(row)]


OPTIONS = [
    *pairs("form", "adapter"),
    *pairs("form", "path"),
    *pairs("adapter", "path"),
    *(pair for other in ("form", "adapter", "path") for pair in pairs(other, "axes")),
]
FEW_PAIRS = [*OPTIONS, *pairs("family", "form", ("tied-auto", "untied-none"))]
"""What has to occur among the cells of plain `pytest`."""
ALL_PAIRS = [*OPTIONS, *(pair for other in ("form", "adapter", "path", "axes") for pair in pairs("family", other))]


def cover(wanted: Iterable[Pair], rows: Iterable[Row] = ()) -> list[Row]:
    """Return rows in which every wanted pair of levels occurs that does not occur in `rows`.

    Each row starts from the first pair that is missing, and takes for every other factor the level that brings most of
    the missing pairs along; of equals the one used least so far.
    """
    missing = dict.fromkeys(wanted)  # ordered, as a set is not
    used = {(name, level): 0 for name in FACTORS for level in FACTORS[name]}
    chosen: list[Row] = []
    for row in rows:
        _note(row, missing, used)
    while missing:
        row = dict(next(iter(missing)))
        for name in FACTORS:
            if name not in row:
                open_levels = [level for level in FACTORS[name] if possible(row | {name: level})]
                row[name] = max(open_levels, key=lambda level: (_gain(row, name, level, missing), -used[name, level]))
        _note(row, missing, used)
        chosen.append(row)
    return chosen


def _gain(row: Row, name: str, level: str, missing: Mapping[Pair, None]) -> int:
    return sum(frozenset({(name, level), other}) in missing for other in row.items())


def _note(row: Row, missing: dict[Pair, None], used: dict[tuple[str, str], int]) -> None:
    for pair in itertools.combinations(row.items(), 2):
        missing.pop(frozenset(pair), None)
    for item in row.items():
        used[item] += 1


def contract_cells() -> tuple[list[Cell], list[Cell]]:
    """Return the cells of plain `pytest`, and those that complete them, each family's together."""
    few = cover(FEW_PAIRS)
    more = cover(ALL_PAIRS, few)
    first, second = ([Cell(**row) for row in rows] for rows in (few, more))
    return sorted(first, key=_place), sorted(second, key=_place)


def _place(cell: Cell) -> int:
    return FAMILIES.index(cell.family)
