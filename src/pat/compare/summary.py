"""From rows to lines of a table: means and spreads over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pat.compare.cells import Cell, Row, chosen_rate, done_cells, result_cells, short_name
from pat.compare.config import CompareConfig
from pat.compare.methods import METHODS, Method


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
class Line:
    """One method at one ratio on one model."""

    model: str
    name: str
    ratio: float
    num_seeds: int
    learning_rate: float
    num_parameters: Spread
    nll: Spread
    """Held-out, in nats per response token."""
    accuracy: Mapping[str, Spread]
    """Unweighted mean over the tasks, by protocol, such as `letter`, and `likelihood, normalised`."""
    sampling_error: Mapping[str, float]
    """Standard error of one seed's mean accuracy for want of questions, by protocol; the first seed's."""
    tasks: Mapping[str, Mapping[str, Spread]]
    """By protocol and task."""
    facts: Mapping[str, Any]
    """The first seed's row."""

    @property
    def method(self) -> Method:
        """What it is."""
        return METHODS[self.name]


def count_missing(config: CompareConfig, rows: Sequence[Row]) -> int:
    """Return how many results are not there, those of methods whose learning rate is still being searched included."""
    done = {cell for cell in done_cells(rows) if not cell.search}
    missing = 0
    for model in map(short_name, config.models):
        for name in config.all_methods:
            rate = chosen_rate(config, model, name, done_cells(rows))
            cells = result_cells(config, model, name, rate or 0.0)
            missing += sum(rate is None or cell not in done for cell in cells)
    return missing


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
                found = [done[cell] for cell in cells if cell in done and done[cell].get("held_out_nll") is not None]
                if found:
                    lines.append(_line(model, name, ratio, rate, found))
    order = {name: index for index, name in enumerate(config.all_methods)}
    models = {short_name(model): index for index, model in enumerate(config.models)}
    return sorted(lines, key=lambda line: (models[line.model], line.ratio, order[line.name]))


def _line(model: str, name: str, ratio: float, rate: float, rows: Sequence[Mapping[str, Any]]) -> Line:
    accuracies = [_accuracies(row.get("tasks") or {}) for row in rows]
    errors = _accuracies(rows[0].get("tasks") or {}, "_stderr")
    tasks = {
        protocol: {task: Spread.of([a[protocol][task] for a in accuracies]) for task in accuracies[0][protocol]}
        for protocol in accuracies[0]
    }
    means = {
        protocol: Spread.of([statistics.mean(a[protocol].values()) for a in accuracies]) for protocol in accuracies[0]
    }
    return Line(
        model=model,
        name=name,
        ratio=ratio,
        num_seeds=len(rows),
        learning_rate=rate,
        num_parameters=Spread.of([row["num_parameters"] for row in rows]),
        nll=Spread.of([row["held_out_nll"] for row in rows]),
        accuracy=means,
        sampling_error={
            protocol: math.hypot(*by_task.values()) / len(by_task)
            for protocol, by_task in errors.items()
            if by_task.keys() == accuracies[0][protocol].keys()
        },
        tasks=tasks,
        facts=rows[0],
    )


def _accuracies(evaluation: Mapping[str, Any], suffix: str = "") -> dict[str, dict[str, float]]:
    """Return accuracy, or what is stored beside it, by protocol and task, from `TaskEvaluation.to_dict()`."""
    result: dict[str, dict[str, float]] = {}
    for score in evaluation.get("scores", ()):
        for metric, kind in (("acc", ""), ("acc_norm", ", normalised")):
            if (value := score.get(metric + suffix)) is not None:
                result.setdefault(score["protocol"] + kind, {})[score["task"]] = value
    return result
