"""From rows to lines of a table: means and spreads over seeds."""

from __future__ import annotations

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
    num_missing: int
    """Cells that are not there, because they failed or were not run."""
    learning_rate: float
    num_parameters: Spread
    nll: Spread
    """Held-out, in nats per response token."""
    accuracy: Mapping[str, Spread]
    """Unweighted mean over the tasks, by protocol, such as `letter`, and `likelihood, normalised`."""
    tasks: Mapping[str, Mapping[str, Spread]]
    """By protocol and task."""
    facts: Mapping[str, Any]
    """The first seed's row."""

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
                found = [done[cell] for cell in cells if cell in done and done[cell].get("held_out_nll") is not None]
                if found:
                    lines.append(_line(model, name, ratio, rate, found, len(cells) - len(found)))
    order = {name: index for index, name in enumerate(config.all_methods)}
    models = {short_name(model): index for index, model in enumerate(config.models)}
    return sorted(lines, key=lambda line: (models[line.model], line.ratio, order[line.name]))


def _line(
    model: str, name: str, ratio: float, rate: float, rows: Sequence[Mapping[str, Any]], num_missing: int
) -> Line:
    accuracies = [_accuracies(row.get("tasks") or {}) for row in rows]
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
        num_missing=num_missing,
        learning_rate=rate,
        num_parameters=Spread.of([row["num_parameters"] for row in rows]),
        nll=Spread.of([row["held_out_nll"] for row in rows]),
        accuracy=means,
        tasks=tasks,
        facts=rows[0],
    )


def _accuracies(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return accuracy by protocol and task, from `TaskEvaluation.to_dict()`."""
    result: dict[str, dict[str, float]] = {}
    for score in evaluation.get("scores", ()):
        result.setdefault(score["protocol"], {})[score["task"]] = score["acc"]
        if score.get("acc_norm") is not None:
            result.setdefault(f"{score['protocol']}, normalised", {})[score["task"]] = score["acc_norm"]
    return result
