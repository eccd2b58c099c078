"""The cells of a comparison, and which of them can be run, given those that are done. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compare.config import CompareConfig
from compare.methods import METHODS, TUNED

Row = dict[str, Any]
"""What was measured in a cell; `row["cell"]` says in which."""


@dataclass(frozen=True)
class Cell:
    """One method on one model, at one ratio (0: unpruned), with one seed and learning rate (0: nothing is trained)."""

    model: str
    """Name of its folder, or of its repository on the hub."""
    method: str
    ratio: float
    seed: int
    learning_rate: float
    search: bool = False
    """Whether it is run to choose the learning rate: trained and judged by the validation rows, not reported."""

    def to_dict(self) -> dict[str, Any]:
        """Return it for a line of JSON."""
        return asdict(self)

    @property
    def name(self) -> str:
        """A name that can be that of a folder."""
        kind = "-search" if self.search else ""
        return f"{self.model}-{self.method}-{self.ratio:g}-seed{self.seed}-lr{self.learning_rate:g}{kind}"

    def describe(self) -> str:
        """Say it in a few words."""
        method = METHODS[self.method]
        ratio = f", {self.ratio:.1%}" if method.prunes else ""
        rate = f", learning rate {self.learning_rate:g}" if self.learning_rate else ""
        kind = "search, " if self.search else ""
        return f"{self.model}: {kind}{method.name_with_order}{ratio}, seed {self.seed}{rate}"


def short_name(model: str) -> str:
    """Return the last part of a path or hub id."""
    return model.rstrip("/").rpartition("/")[2]


def done_cells(rows: Collection[Row]) -> dict[Cell, Row]:
    """Return the rows by cell."""
    return {Cell(**row["cell"]): row for row in rows}


def search_cells(config: CompareConfig, model: str, method: str) -> list[Cell]:
    """Return the cells whose validation loss decides a method's learning rate; none if there is no choice."""
    if not METHODS[method].trains or len(config.learning_rates) == 1:
        return []
    ratio = config.ablation_ratio if METHODS[method].prunes else 0.0
    return [Cell(model, method, ratio, config.seeds[0], rate, search=True) for rate in config.learning_rates]


def chosen_rate(config: CompareConfig, model: str, method: str, done: Mapping[Cell, Row]) -> float | None:
    """Return a method's learning rate on a model, None while its search is not finished; 0.0 where nothing trains.

    What is pruned after tuning has the rate of the model that it prunes.
    """
    if METHODS[method].order == "FT→P":
        return chosen_rate(config, model, TUNED, done)
    if not METHODS[method].trains:
        return 0.0
    cells = search_cells(config, model, method)
    if not cells:
        return config.learning_rates[0]
    if any(cell not in done for cell in cells):
        return None

    def loss(cell: Cell) -> float:
        nll = done[cell]["validation_nll"]
        return math.inf if nll is None else float(nll)  # None: diverged

    return min(cells, key=loss).learning_rate


def result_cells(config: CompareConfig, model: str, method: str, rate: float) -> Iterator[Cell]:
    """Yield the cells that a method's lines of the table are made of."""
    if method == "base":
        yield Cell(model, method, 0.0, config.seeds[0], rate)
        return
    for ratio in sorted({0.0, config.ablation_ratio, *config.ratios}):
        if method in config.methods_at(ratio):
            for seed in config.seeds:
                yield Cell(model, method, ratio, seed, rate)


def ready_cells(config: CompareConfig, done: Mapping[Cell, Row]) -> list[Cell]:
    """Return the cells that are not done and need nothing that is not done, most needed first."""
    ready: list[Cell] = []
    for model in map(short_name, config.models):
        for method in sorted(config.all_methods, key=lambda name: name != TUNED):  # others wait for its models
            ready += [cell for cell in search_cells(config, model, method) if _has_tuned(config, cell, done)]
    for model in map(short_name, config.models):
        for method in config.all_methods:
            rate = chosen_rate(config, model, method, done)
            if rate is None:
                continue
            ready += [cell for cell in result_cells(config, model, method, rate) if _has_tuned(config, cell, done)]
    return [cell for cell in dict.fromkeys(ready) if cell not in done]


def tuned_cell(config: CompareConfig, cell: Cell, done: Mapping[Cell, Row]) -> Cell | None:
    """Return the cell whose tuned model a cell prunes or learns from; None while LoRA's rate is being searched."""
    rate = chosen_rate(config, cell.model, TUNED, done)
    return None if rate is None else Cell(cell.model, TUNED, 0.0, cell.seed, rate)


def _has_tuned(config: CompareConfig, cell: Cell, done: Mapping[Cell, Row]) -> bool:
    """Tell whether the tuned model that a cell needs is there, if it needs one."""
    return not METHODS[cell.method].needs_tuned or tuned_cell(config, cell, done) in done


def num_missing(config: CompareConfig, done: Mapping[Cell, Row]) -> int:
    """Return how many results are not there, those of methods whose learning rate is still being searched included."""
    missing = 0
    for model in map(short_name, config.models):
        for method in config.all_methods:
            rate = chosen_rate(config, model, method, done)
            cells = result_cells(config, model, method, rate or 0.0)
            missing += sum(rate is None or cell not in done for cell in cells)
    return missing


def num_open(config: CompareConfig, done: Mapping[Cell, Row]) -> int:
    """Return how many cells are not done; those done for other methods, ratios or seeds do not count."""
    searches = (
        search_cells(config, model, name) for model in map(short_name, config.models) for name in config.all_methods
    )
    return num_missing(config, done) + sum(cell not in done for cells in searches for cell in cells)


def is_asked_for(config: CompareConfig, cell: Cell) -> bool:
    """Tell whether a cell belongs to a comparison's models, methods, ratios and seeds, whatever its learning rate."""
    if cell.model not in map(short_name, config.models) or cell.method not in config.all_methods:
        return False
    return cell.search or (cell.seed in config.seeds and cell.method in config.methods_at(cell.ratio))


def num_cells(config: CompareConfig) -> int:
    """Return how many cells there are in all."""
    total = 0
    for model in map(short_name, config.models):
        for method in config.all_methods:
            total += len(list(result_cells(config, model, method, 0.0))) + len(search_cells(config, model, method))
    return total
