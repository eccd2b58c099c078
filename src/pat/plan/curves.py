"""Record and table of what cutting each axis costs, and of the shapes that come out best under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TextIO

from pat.report import numbers
from pat.report.table import Table
from pat.shape import AXES


@dataclass(frozen=True)
class Point:
    """A shape, and what it costs before training."""

    sizes: dict[str, int]
    """Sizes of the axes that are cut, by the name of the option that asks for them."""
    pruning_ratio: float
    """Share of all parameters that is cut."""
    nll: float
    """Mean loss of a response token, in nats."""
    predicted_nll: float | None = None
    """The same if the axes cost together what each costs alone by its curve; None for a single axis, whose loss there
    is nothing to predict from."""
    difference_error: float | None = None
    """Standard error of the difference to the base's `nll`, over the same rows; None where it is not known."""
    best_error: float | None = None
    """Standard error of the difference to the `nll` of the candidate that is best before training, over the same rows;
    None for that one, and for what is no candidate."""
    tuned_nll: float | None = None
    """Loss of the dense model after the steps of a search, on the rows that `pat tune` holds out; None without one."""

    def options(self) -> str:
        """Return the flags of `pat tune` that ask for this shape."""
        return flags(self.sizes)


@dataclass(frozen=True)
class Measured:
    """Curves and candidates of a model on a dataset."""

    dataset: str
    num_calibration_tokens: int
    num_scored_tokens: int
    base_nll: float
    curves: dict[str, tuple[Point, ...]]
    """Points of each axis that can be cut, by the share of parameters, ascending."""
    candidates: tuple[Point, ...]
    """Shapes that meet the budget, best first: after the steps of the search, or before training without one."""
    default: dict[str, int]
    """Sizes that `pat tune` takes for the budget by itself, which are among the candidates."""
    num_steps: int = 0
    """Optimizer steps that each candidate was tuned for."""
    num_threads: int | None = None
    """Number of threads of torch on the CPU that measured; None on an accelerator."""


def flags(sizes: Mapping[str, int]) -> str:
    """Return the flags of `pat tune` that ask for some sizes; none for the base."""
    return " ".join(f"--{name} {size}" for name, size in sizes.items())


def named(point: Point) -> str:
    """Return what a shape keeps of each axis that is cut."""
    labels = {axis.option: axis.label for axis in AXES.values()}
    return ", ".join(f"{labels[option]} {size:,}" for option, size in point.sizes.items())


def measured_table(measured: Measured) -> Table:
    """Return the table of curves and candidates for people."""

    def row(point: Point) -> list[str]:
        above = numbers.difference(point.nll - measured.base_nll, point.difference_error)
        tuned = [""] * bool(measured.num_steps) if point.tuned_nll is None else [f"{point.tuned_nll:.3f}"]
        return [
            named(point),
            f"{point.pruning_ratio:.1%}",
            f"{point.nll:.3f}",
            above,
            numbers.loss(point.predicted_nll),
            *tuned,
        ]

    known = [candidate.sizes for candidate in measured.candidates]
    curves = [row(point) for points in measured.curves.values() for point in points if point.sizes not in known]
    tuned = [f"after {measured.num_steps} steps"] if measured.num_steps else []
    base = ["the base, uncut", "", f"{measured.base_nll:.3f}", "", "", *[""] * len(tuned)]
    rows = [base, *curves, *map(row, measured.candidates)]
    title = (
        f"Loss before any training, in nats per token over {measured.num_scored_tokens:,} response tokens of "
        f"{measured.dataset}, calibrated on {measured.num_calibration_tokens:,}; shapes that meet the budget below the "
        "line, best first"
    )
    columns = ("shape", "cut", "loss", "above base", "predicted", *tuned)
    return Table(title, columns, rows, num_totals=len(measured.candidates))


def print_measured(measured: Measured, *, file: TextIO | None = None) -> None:
    """Print the table of curves and candidates, and what has to be known to read it."""
    measured_table(measured).print(file=file)
    if measured.num_threads is not None:
        plural = "" if measured.num_threads == 1 else "s"
        print(f"Measured with {measured.num_threads} thread{plural} on this CPU.", file=file)
    points = [*(point for curve in measured.curves.values() for point in curve), *measured.candidates]
    if any(point.predicted_nll is not None for point in points):
        print(
            "Predicted is what several axes would cost together if each cost what it costs alone; there is nothing to "
            "predict for one axis (–).",
            file=file,
        )
    apart = {
        point.options(): numbers.is_told_apart(point.nll - measured.base_nll, point.difference_error)
        for point in points
    }
    if open_ := [name for name, is_apart in apart.items() if not is_apart]:
        print(
            f"Not told apart from the base's by so few rows (within {numbers.STANDARD_ERRORS} standard errors of 0, "
            f"±): {', '.join(open_)}.",
            file=file,
        )
    if any(point.nll < measured.base_nll and apart[point.options()] for point in points):
        print(
            "A loss below the base's is no gain of the cut: what stays was refitted to text of the same data, which "
            "the base has never seen.",
            file=file,
        )


def interpolated(points: tuple[Point, ...], base_nll: float, ratio: float) -> float:
    """Return what a cut costs beyond the base's loss, on the line between its neighbours on a curve from (0, 0)."""
    known = [(0.0, 0.0), *((point.pruning_ratio, point.nll - base_nll) for point in points)]
    for (x0, y0), (x1, y1) in pairwise(known):
        if ratio <= x1:
            return y0 + (y1 - y0) * (ratio - x0) / (x1 - x0)
    return known[-1][1] * ratio / known[-1][0]
