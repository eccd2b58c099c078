"""Which cells there are, in which order they can be run, and how learning rates are chosen."""

from pathlib import Path
from typing import Any

from compare.cells import (
    Cell,
    chosen_rate,
    done_cells,
    is_asked_for,
    num_cells,
    num_open,
    ready_cells,
    result_cells,
    tuned_cell,
)
from compare.config import CompareConfig


def config(**overrides: Any) -> CompareConfig:
    settings: dict[str, Any] = {
        "models": ["models/small"],
        "data": "rows.jsonl",
        "methods": ["base", "lora", "slicegpt", "slicegpt_after", "pat"],
        "ablations": ["random"],
        "ratios": [0.25, 0.5],
        "seeds": [0, 1],
        "learning_rates": [1e-3, 2e-3],
        "output_dir": Path("out"),
        "steps": 3,
    }
    return CompareConfig(**settings | overrides)


def row(cell: Cell, **figures: float | None) -> dict[str, object]:
    return {"cell": cell.to_dict(), "validation_nll": 1.0, **figures}


def run_all(settings: CompareConfig) -> list[Cell]:
    """Run everything that is ready, one cell at a time, and return the order."""
    done: dict[Cell, dict[str, object]] = {}
    while ready := ready_cells(settings, done):
        done[ready[0]] = row(ready[0])
    return list(done)


def test_a_whole_comparison_is_searches_and_results() -> None:
    settings = config()
    cells = run_all(settings)
    assert len(cells) == len(set(cells)) == num_cells(settings)
    # base 1; LoRA 2 seeds; SliceGPT twice and PAT, 2 ratios x 2 seeds each; random at one ratio; 4 searches of 2.
    assert sum(not cell.search for cell in cells) == 1 + 2 + 3 * 4 + 2
    assert sum(cell.search for cell in cells) == 4 * 2
    assert {cell.ratio for cell in cells if cell.method == "random"} == {0.25}
    assert {cell.ratio for cell in cells if cell.method in ("base", "lora")} == {0.0}


def test_what_is_open_does_not_count_what_is_not_asked_for() -> None:
    whole = config()
    done = {cell: row(cell) for cell in run_all(whole)}
    assert num_open(whole, {}) == num_cells(whole) and num_open(whole, done) == 0
    few = config(methods=["lora"], ablations=[], ratios=[0.25], seeds=[0, 2])
    assert num_cells(few) == 2 + 2 and num_open(few, done) == 1


def test_no_cell_runs_before_what_it_needs() -> None:
    settings = config()
    order = run_all(settings)
    for index, cell in enumerate(order):
        earlier = done_cells([row(c) for c in order[:index]])
        if cell.method == "slicegpt_after":
            assert tuned_cell(settings, cell, earlier) in earlier
        elif not cell.search and cell.method != "base":
            assert chosen_rate(settings, cell.model, cell.method, earlier) == cell.learning_rate


def test_the_rate_with_the_least_validation_loss_wins_and_a_diverged_one_never() -> None:
    settings = config(learning_rates=[1e-3, 2e-3, 4e-3])
    losses = {1e-3: None, 2e-3: 2.0, 4e-3: 3.0}
    done = done_cells([row(Cell("small", "lora", 0.0, 0, r, search=True), validation_nll=v) for r, v in losses.items()])
    assert chosen_rate(settings, "small", "lora", done) == 2e-3
    del done[Cell("small", "lora", 0.0, 0, 1e-3, search=True)]
    assert chosen_rate(settings, "small", "lora", done) is None


def test_ft_p_prunes_the_model_of_its_own_seed_and_of_the_chosen_rate() -> None:
    settings = config()
    done = {cell: row(cell, validation_nll=1 / cell.learning_rate) for cell in run_all(settings) if cell.search}
    cells = [cell for cell in run_all(settings) if cell.method == "slicegpt_after"]
    assert chosen_rate(settings, "small", "slicegpt_after", done) == 2e-3
    after = Cell("small", "slicegpt_after", 0.5, 1, 2e-3)
    assert tuned_cell(settings, after, done) == Cell("small", "lora", 0.0, 1, 2e-3)
    assert len(cells) == 4
    # Another rate of LoRA's is another model: what was pruned from the old one is not a result any more.
    wider = config(learning_rates=[1e-3, 2e-3, 4e-3])
    better = Cell("small", "lora", 0.0, 0, 4e-3, search=True)
    done = {cell: row(cell) for cell in run_all(settings)} | {better: row(better, validation_nll=0.5)}
    assert [cell.learning_rate for cell in ready_cells(wider, done) if cell.method == "lora"] == [4e-3, 4e-3]
    done |= {Cell("small", "lora", 0.0, seed, 4e-3): row(better) for seed in (0, 1)}
    after = [cell for cell in ready_cells(wider, done) if cell.method == "slicegpt_after"]
    assert len(after) == 4 and {cell.learning_rate for cell in after} == {4e-3}


def test_what_has_a_teacher_waits_for_it_even_to_be_searched() -> None:
    settings = config(methods=["lora", "minitron", "minitron_ce"], ablations=[])
    order = run_all(settings)
    assert len(order) == num_cells(settings)
    for index, cell in enumerate(order):
        if cell.method == "minitron":
            assert Cell("small", "lora", 0.0, cell.seed, 1e-3) in order[:index]
    first = ready_cells(settings, {})
    assert {cell.method for cell in first} == {"lora", "minitron_ce"} and all(cell.search for cell in first)


def test_a_single_rate_is_not_searched() -> None:
    settings = config(learning_rates=[1e-3])
    assert not any(cell.search for cell in run_all(settings))
    assert {cell.learning_rate for cell in run_all(settings) if cell.method == "pat"} == {1e-3}


def test_what_is_done_is_not_ready() -> None:
    settings = config()
    first = ready_cells(settings, {})
    assert first[0].method == "lora"  # others wait for its models
    done = done_cells([row(cell) for cell in first[:3]])
    assert not set(first[:3]) & set(ready_cells(settings, done))


def test_seeds_and_rates_are_in_a_cells_name() -> None:
    cells = list(result_cells(config(), "small", "pat", 1e-3))
    assert len({cell.name for cell in cells}) == len(cells) == 4
    assert all("/" not in cell.name for cell in cells)


def test_what_belongs_to_a_comparison_does_not_depend_on_the_rate() -> None:
    settings = config()
    assert all(is_asked_for(settings, cell) for cell in run_all(settings))
    assert is_asked_for(settings, Cell("small", "pat", 0.25, 0, 0.5))
    for other in (
        Cell("large", "pat", 0.25, 0, 1e-3),
        Cell("small", "magnitude", 0.25, 0, 1e-3),
        Cell("small", "pat", 0.75, 0, 1e-3),
        Cell("small", "random", 0.5, 0, 1e-3),
        Cell("small", "pat", 0.25, 7, 1e-3),
    ):
        assert not is_asked_for(settings, other)
