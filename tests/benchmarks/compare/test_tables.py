"""From rows to tables and figures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from compare.cells import Cell, Row, done_cells, num_missing
from compare.config import CompareConfig
from compare.figure import draw_accuracy, draw_curves, draw_nll
from compare.methods import outdated
from compare.results import FILE, append_row, read_current_rows, read_rows, row_identity
from compare.summary import summarise
from compare.tables import markdown

from pat.tuner.options import PatOptions


def config(folder: Path, **overrides: Any) -> CompareConfig:
    settings: dict[str, Any] = {
        "models": ["models/small"],
        "data": "rows.jsonl",
        "methods": ["lora", "pat"],
        "ratios": [0.25],
        "seeds": [0, 1, 2],
        "learning_rates": [1e-3],
        "output_dir": folder,
        "steps": 3,
    }
    return CompareConfig(**settings | overrides)


def row(settings: CompareConfig, method: str, seed: int, nll: float, accuracy: float) -> dict[str, Any]:
    ratio = 0.25 if method == "pat" else 0.0
    scores = [
        {"task": task, "protocol": "likelihood", "acc": accuracy + shift, "acc_norm": accuracy, "num_questions": 4}
        for task, shift in (("piqa", 0.1), ("rte", -0.1))
    ]
    cell = Cell("small", method, ratio, seed, 1e-3)
    return {
        "cell": cell.to_dict(),
        "identity": row_identity(settings, cell),
        "inputs": {},
        "held_out_nll": nll,
        "num_parameters": 750 if method == "pat" else 1000,
        "tasks": {"scores": scores},
    }


def count_missing(settings: CompareConfig, some: list[Row]) -> int:
    return num_missing(settings, done_cells(some))


def rows(settings: CompareConfig) -> list[dict[str, Any]]:
    lora = [row(settings, "lora", seed, 2.0, 0.5) for seed in range(3)]
    return lora + [row(settings, "pat", seed, 2.0 + 0.1 * seed, 0.4) for seed in range(3)]


def test_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    settings = config(tmp_path)
    _, line = summarise(settings, rows(settings))
    assert line.name == "pat" and line.num_seeds == 3
    assert line.nll.mean == pytest.approx(2.1) and line.nll.deviation == pytest.approx(0.1)
    assert line.accuracy["likelihood"].mean == pytest.approx(0.4)
    assert line.tasks["likelihood"]["piqa"].mean == pytest.approx(0.5)


def test_the_table_says_what_is_missing_and_what_share_is_left(tmp_path: Path) -> None:
    settings = config(tmp_path)
    some = rows(settings)[:-1]
    table = markdown(settings, summarise(settings, some), count_missing(settings, some))
    assert "Missing cells: 1." in table
    assert "(75.0%)" in table and "2.050 ± 0.071" in table and "40.00 ± 0.00" in table


def test_a_method_without_any_result_is_missing_too(tmp_path: Path) -> None:
    settings = config(tmp_path, learning_rates=[1e-3, 1e-2])
    assert count_missing(settings, []) == 6  # nothing is known of any rate
    settings = config(tmp_path)
    assert count_missing(settings, rows(settings)) == 0
    assert count_missing(settings, [r for r in rows(settings) if r["cell"]["method"] == "lora"]) == 3


def test_the_orders_of_the_table_are_explained_and_no_others(tmp_path: Path) -> None:
    settings = config(tmp_path)
    table = markdown(settings, summarise(settings, rows(settings)))
    assert "FT: tuned alone." in table and "PAT: pruned while it is tuned." in table and "FT→P" not in table


def test_the_table_says_on_how_many_tokens_it_stands_and_at_which_rate_a_pruned_model_was_tuned(tmp_path: Path) -> None:
    settings = config(tmp_path, methods=["lora", "slicegpt_after"], held_out=1200)
    some = [row(settings, "lora", 0, 2.0, 0.5) | {"num_held_out_tokens": 3978}]
    after = Cell("small", "slicegpt_after", 0.25, 0, 1e-3)
    some += [row(settings, "pat", 0, 3.0, 0.5) | {"cell": after.to_dict()}]
    table = markdown(settings, summarise(settings, some))
    assert "held-out response token of the base (small 3,978; 1,200 rows)" in table
    (line,) = (line for line in table.split("small: budgets")[1].splitlines() if "SliceGPT" in line)
    assert "| 0.001 |" in line and "learning rate 0.001" in after.describe()


def test_without_an_unpruned_model_there_is_no_share(tmp_path: Path) -> None:
    settings = config(tmp_path, methods=["pat"])
    table = markdown(settings, summarise(settings, rows(settings)[3:]))
    assert "0.001 M |" in table and "(100.0%)" not in table


def test_the_error_of_few_questions_is_stated(tmp_path: Path) -> None:
    settings = config(tmp_path)
    some = rows(settings)
    for entry in some:
        for score, error in zip(entry["tasks"]["scores"], (0.03, 0.04), strict=True):
            score |= {"acc_stderr": error, "acc_norm_stderr": 2 * error}
    (line, *_) = summarise(settings, some)
    assert line.sampling_error == pytest.approx({"likelihood": 0.025, "likelihood, normalised": 0.05})
    assert "2.5 (likelihood), 5.0 (likelihood, normalised)" in markdown(settings, [line])


def test_a_seed_that_diverged_is_said_not_dropped(tmp_path: Path) -> None:
    settings = config(tmp_path)
    some = rows(settings)
    some[-1]["held_out_nll"] = None
    lines = summarise(settings, some)
    assert lines[1].num_seeds == 2 and lines[1].num_diverged == 1 and count_missing(settings, some) == 0
    assert "2.050 ± 0.071 (1 of 3 diverged)" in markdown(settings, lines)
    for entry in some[3:]:
        entry["held_out_nll"] = None
        entry.pop("num_parameters")  # there is no model
    lines = summarise(settings, some)
    assert "| PAT | PAT |  | (3 of 3 diverged) |" in markdown(settings, lines)
    pytest.importorskip("matplotlib")
    draw_nll(lines, tmp_path / "nll.png")


def test_a_mean_over_fewer_seeds_says_so(tmp_path: Path) -> None:
    settings = config(tmp_path)
    some = rows(settings)[:-1]
    assert "2.050 ± 0.071 (2 of 3 seeds)" in markdown(settings, summarise(settings, some))
    some[-1]["held_out_nll"] = None
    assert "2.000 (1 of 2 diverged, 2 of 3 seeds)" in markdown(settings, summarise(settings, some))


def test_a_rate_at_the_edge_and_a_budget_missed_are_seen(tmp_path: Path) -> None:
    settings = config(tmp_path, learning_rates=[1e-3, 1e-2, 1e-1], methods=["lora"])
    done = [row(settings, "lora", 0, 2.0, 0.5) | {"num_trainable": 1_500_000, "trainable_budget": 1_000_000}]
    for rate, nll in ((1e-3, 1.0), (1e-2, 2.0), (1e-1, 3.0)):
        cell = Cell("small", "lora", 0.0, 0, rate, search=True).to_dict()
        done.append({"cell": cell, "identity": settings.identity(), "inputs": {}, "validation_nll": nll})
    table = markdown(settings, summarise(settings, done))
    assert "| 0.001 ⁺ |" in table and "1.500 M (150.0%)" in table
    done[1]["validation_nll"] = 2.5
    done[0]["cell"]["learning_rate"] = 1e-2
    assert "| 0.01 |" in markdown(settings, summarise(settings, done))


def test_the_table_says_where_it_was_measured(tmp_path: Path) -> None:
    settings = config(tmp_path)
    some = rows(settings)
    for number, entry in enumerate(some):
        entry |= {"machine": {"device": f"card {number // 3}", "num_threads": 2}, "versions": {"torch": "9.9"}}
    table = markdown(settings, summarise(settings, some))
    assert "Measured on: card 0, threads of a worker: 2; torch 9.9; and on card 1" in table


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    settings = config(tmp_path, seeds=[0])
    table = markdown(settings, summarise(settings, rows(settings)))
    main = table.split("###")[0]
    assert "2.000 |" in main and "2.000 ±" not in main


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = config(tmp_path)
    lines = summarise(settings, rows(settings))
    for name, draw in (("nll.png", draw_nll), ("accuracy.png", draw_accuracy)):
        draw(lines, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_over_the_seeds_and_are_drawn(tmp_path: Path) -> None:
    settings = config(tmp_path, eval_steps=1)
    some: list[dict[str, Any]] = rows(settings)
    for number, entry in enumerate(some):
        entry["curve"] = [
            {"step": step, "tokens": 100 * step, "flops": 1e9 * step, "nll": 3.0 - 0.1 * step + 0.1 * (number % 3)}
            for step in (1, 2, 3)
        ]
    lines = summarise(settings, some)
    last = lines[1].curve[-1]
    assert (last.step, last.tokens, last.flops) == (3, 300, 3e9)
    assert last.nll.mean == pytest.approx(2.8) and last.nll.deviation == pytest.approx(0.1)
    some[-1]["curve"].pop()  # a seed that was cut off
    assert [point.step for point in summarise(settings, some)[1].curve] == [1, 2]
    pytest.importorskip("matplotlib")
    draw_curves(settings, lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_rows_come_back_but_those_of_failed_cells_and_torn_lines_do_not(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first, second, *_ = rows(settings)
    append_row(settings, first)
    append_row(settings, second | {"failed": "out of memory"})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"cell": {"mod')
    append_row(settings, second)
    assert [r["cell"] for r in read_rows(settings)] == [first["cell"], second["cell"]]


def test_rows_of_an_older_default_are_not_taken_for_current_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path)
    for entry in rows(settings):
        append_row(settings, entry)
    assert len(read_current_rows(settings)) == 6 and not caplog.text

    @dataclass
    class Changed(PatOptions):
        axes: list[str] = field(default_factory=lambda: ["hidden"])

    monkeypatch.setattr("pat.tuner.options.PatOptions", Changed)
    assert {entry["cell"]["method"] for entry in read_current_rows(settings)} == {"lora"}
    assert "3 of pat, axes=['auto'], now ['hidden']" in caplog.text
    table = markdown(settings, summarise(settings, read_rows(settings)))
    assert "today's defaults and version of the method: PAT (axes=['auto'], now ['hidden'])." in table
    explicit = Cell("small", "pat_hidden", 0.25, 0, 1e-3)  # says what the default says now
    entry = row(settings, "pat", 0, 2.0, 0.4) | {"cell": explicit.to_dict()}
    entry |= {"identity": row_identity(settings, explicit)}
    monkeypatch.undo()
    assert outdated(entry) is None
    entry["identity"]["method"]["learning_rate"] = 7.0  # a recipe's, where the comparison has its own
    assert outdated(entry) is None
    monkeypatch.setattr("compare.methods.PAT_REVISION", 99)
    assert outdated(entry) == "revision=3, now 99"
    del entry["identity"]["method"]
    assert outdated(entry) == "with which ones is not on record"


def test_another_comparisons_folder_is_refused(tmp_path: Path) -> None:
    from pat import PatError

    settings = config(tmp_path)
    append_row(settings, rows(settings)[0])
    with pytest.raises(PatError, match=r"steps=3, got 4.*--output_dir"):
        read_rows(config(tmp_path, steps=4))
    # More seeds, ratios and methods go on with what is there.
    assert len(read_rows(config(tmp_path, seeds=[0, 1, 2, 3], methods=["base", "lora", "pat"]))) == 1
