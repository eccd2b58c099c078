"""From rows to lines of a table: means and spreads over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compare.cells import Cell, Row, chosen_rate, done_cells, result_cells, short_name
from compare.config import CompareConfig
from compare.methods import METHODS, Method, outdated


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; None for a single one."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class CurvePoint:
    """A point of a training, the same step of every seed."""

    step: int
    tokens: float
    flops: float
    nll: Spread


@dataclass(frozen=True)
class Line:
    """One method at one ratio on one model."""

    model: str
    name: str
    ratio: float
    num_seeds: int
    """Number of seeds of which there are figures."""
    num_diverged: int
    """Seeds more, whose tuned model has no finite loss; no figure holds them."""
    learning_rate: float
    num_parameters: Spread | None
    """None if every seed diverged."""
    nll: Spread | None
    """Held-out, in nats per response token; None if every seed diverged."""
    accuracy: Mapping[str, Spread]
    """Unweighted mean over the tasks, by protocol, such as `letter`, and `likelihood, normalised`."""
    sampling_error: Mapping[str, float]
    """Standard error of one seed's mean accuracy for want of questions, by protocol; the largest of any seed."""
    tasks: Mapping[str, Mapping[str, Spread]]
    """Figures by protocol and task."""
    outdated: tuple[str, ...]
    """Differences between the method as it was run and as it is now, see `compare.methods.outdated`."""
    curve: tuple[CurvePoint, ...]
    """Validation NLL while it trains, where that was measured; of the steps that every seed has."""
    facts: Mapping[str, Any]
    """The first seed's row."""
    machines: tuple[str, ...]
    """What it was measured on and with."""

    @property
    def method(self) -> Method:
        """What it is."""
        return METHODS[self.name]


def summarise(config: CompareConfig, rows: Sequence[Row]) -> list[Line]:
    """Return the lines of the tables, by model, ratio and method."""
    done = done_cells(rows)
    lines = []
    for model in map(short_name, config.models):
        for name in config.all_methods:
            rate = chosen_rate(config, model, name, done)
            if rate is None:
                continue
            by_ratio: dict[float, list[Cell]] = {}
            for cell in result_cells(config, model, name, rate):
                by_ratio.setdefault(cell.ratio, []).append(cell)
            for ratio, cells in by_ratio.items():
                found = [done[cell] for cell in cells if cell in done]
                if found:
                    lines.append(_line(model, name, ratio, rate, found))
    order = {name: index for index, name in enumerate(config.all_methods)}
    models = {short_name(model): index for index, model in enumerate(config.models)}
    return sorted(lines, key=lambda line: (models[line.model], line.ratio, order[line.name]))


def _line(model: str, name: str, ratio: float, rate: float, rows: Sequence[Mapping[str, Any]]) -> Line:
    finite = [row for row in rows if row.get("held_out_nll") is not None]
    accuracies = [_accuracies(row.get("tasks") or {}) for row in finite]
    protocols = list(accuracies[0]) if accuracies else []
    return Line(
        model=model,
        name=name,
        ratio=ratio,
        num_seeds=len(finite),
        num_diverged=len(rows) - len(finite),
        learning_rate=rate,
        num_parameters=_spread([row["num_parameters"] for row in rows if "num_parameters" in row]),
        nll=_spread([row["held_out_nll"] for row in finite]),
        accuracy={p: Spread.of([statistics.mean(a[p].values()) for a in accuracies]) for p in protocols},
        sampling_error=_sampling_errors(finite),
        tasks={p: {task: Spread.of([a[p][task] for a in accuracies]) for task in accuracies[0][p]} for p in protocols},
        outdated=tuple(dict.fromkeys(reason for row in rows if (reason := outdated(row)))),
        curve=_curve([row["curve"] for row in finite if row.get("curve")]),
        facts=rows[0],
        machines=tuple(dict.fromkeys(_machine(row) for row in rows)),
    )


def _curve(curves: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[CurvePoint, ...]:
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for curve in curves:
        for point in curve:
            by_step.setdefault(point["step"], []).append(point)
    return tuple(
        CurvePoint(
            step,
            statistics.mean(point["tokens"] for point in points),
            statistics.mean(point["flops"] for point in points),
            Spread.of([point["nll"] for point in points]),
        )
        for step, points in sorted(by_step.items())
        if len(points) == len(curves)
    )


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


def _sampling_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for row in rows:
        tasks = row.get("tasks") or {}
        for protocol, errors in _accuracies(tasks, "_stderr").items():
            if errors.keys() == _accuracies(tasks)[protocol].keys():
                error = math.hypot(*errors.values()) / len(errors)
                largest[protocol] = max(error, largest.get(protocol, 0.0))
    return largest


def _machine(row: Mapping[str, Any]) -> str:
    if "machine" not in row:
        return ""
    machine, versions = row["machine"], ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return f"{machine['device']}, threads of a worker: {machine['num_threads']}; {versions}"


def _accuracies(evaluation: Mapping[str, Any], suffix: str = "") -> dict[str, dict[str, float]]:
    """Return accuracy, or what is stored beside it, by protocol and task, from a `TaskScores` as a dictionary."""
    result: dict[str, dict[str, float]] = {}
    for score in evaluation.get("scores", ()):
        for metric, kind in (("acc", ""), ("acc_norm", ", normalised")):
            if (value := score.get(metric + suffix)) is not None:
                result.setdefault(score["protocol"] + kind, {})[score["task"]] = value
    return result
