"""What cutting an axis costs, measured on a small model that was trained."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pat.cli import main
from pat.errors import Interrupted
from pat.loading import load_config
from pat.plan import measure, scorer
from pat.plan.curves import Measured, Point, interpolated, print_measured
from pat.plan.options import PlanOptions
from pat.plan.recommend import recommend

TESTS = Path(__file__).parents[2]
STORIES, DATA = TESTS / "data" / "stories260K", TESTS / "data" / "instructions.jsonl"


def test_curves_rise_and_candidates_meet_the_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(scorer, "NUM_TOKENS", 4096)
    monkeypatch.setattr(scorer, "SPLITS", (0.5,))
    monkeypatch.setattr(scorer, "NUM_PAIRS", 1)
    figure = tmp_path / "curves.png"
    flags = ["--model_name_or_path", str(STORIES), "--calibrate", str(DATA), "--figure", str(figure), "--json"]
    assert main(["plan", *flags, "--shape_search_steps", "2"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    for points in measured["curves"].values():
        losses = [measured["base_nll"], *(point["nll"] for point in points)]
        assert losses == sorted(losses)
    candidates = measured["candidates"]
    assert [point["tuned_nll"] for point in candidates] == sorted(point["tuned_nll"] for point in candidates)
    assert all(abs(point["pruning_ratio"] - 0.25) < 0.0251 for point in candidates)
    # The rule of `axes="auto"` is among them, and two axes cost about what their curves say.
    assert {"pruned_intermediate_size": 104} in [point["sizes"] for point in candidates]
    predicted = [point for point in candidates if point["predicted_nll"] is not None]
    assert predicted and all(abs(point["nll"] - point["predicted_nll"]) < 0.5 for point in predicted)
    assert all(len(point["sizes"]) == 2 for point in predicted)
    # The rows are the same ones for all shapes; only the best one has none before it.
    assert all(0 < point["difference_error"] < 0.3 for point in candidates)
    assert sum(point["best_error"] is None for point in candidates) == 1
    assert figure.stat().st_size > 10_000


def test_an_interruption_shows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = scorer.ShapeScorer.nll

    def nll(self: scorer.ShapeScorer, sizes: dict[str, int]) -> float:
        if len(self.losses) == 5:
            raise KeyboardInterrupt
        return score(self, sizes)

    monkeypatch.setattr(scorer.ShapeScorer, "nll", nll)
    assert main(["plan", "--model_name_or_path", str(STORIES), "--calibrate", str(DATA), "--json"]) == 130
    printed = capsys.readouterr()
    assert printed.out == ""  # a plan or nothing
    assert printed.err.splitlines()[-1] == "pat: interrupted"
    table = printed.err.partition("Measured until then:")[2]
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert [row.rpartition(" ")[0] for row in rows] == ["", *["hidden size"] * 2, *["MLP channels"] * 2]


def test_what_it_takes_is_said_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nll(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(scorer.ShapeScorer, "nll", nll)
    flags = ["--model_name_or_path", str(STORIES), "--calibrate", str(DATA), "--shape_search_steps", "7"]
    assert main(["plan", *flags]) == 130
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Expected: ")]
    assert "minute" in said and "13 shapes" in said and "tuned for 7 steps" in said


A, B = {"pruned_intermediate_size": 104}, {"pruned_hidden_size": 56}


def measured(*candidates: Point, default: dict[str, int]) -> Measured:
    return Measured("data.jsonl", 8000, 2000, 4.0, {}, candidates, default)


def test_a_gain_of_a_cut_is_shown_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    noise, fitted = Point(A, 0.25, 3.9, difference_error=0.06), Point(B, 0.25, 3.8, difference_error=0.06)
    print_measured(measured(noise, default=A))
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "−0.100 ± 0.060" in printed and "(within 2 standard errors of 0, ±): --pruned_intermediate_size 104." in printed
    )
    assert "no gain" not in printed
    print_measured(measured(noise, fitted, default=A))
    printed = " ".join(capsys.readouterr().out.split())
    assert "A loss below the base's is no gain of the cut" in printed
    print_measured(measured(Point(A, 0.25, 4.5, difference_error=0.06), default=A))
    printed = capsys.readouterr().out
    assert "Not told apart" not in printed and "no gain" not in printed and "Predicted" not in printed


@pytest.mark.parametrize(("error", "taken"), [(0.06, A), (0.04, B), (None, A)])
def test_the_default_is_recommended_unless_another_shape_is_seen_to_be_better(
    error: float | None, taken: dict[str, int]
) -> None:
    options = PlanOptions(model_name_or_path="base", calibrate="my data.jsonl")
    found = measured(Point(B, 0.25, 4.4), Point(A, 0.25, 4.5, best_error=error), default=A)
    said = recommend(options, [0.25], found)
    (flags,) = [f"--{name} {size}" for name, size in taken.items()]
    assert f"pat tune --model_name_or_path base --dataset_name 'my data.jsonl' {flags} --output_dir out" in said


@pytest.mark.parametrize(
    ("asked", "ratios", "flags", "words"),
    [
        ({}, [0.25], "--pruning_ratio 0.25", "else begin with an eighth"),
        (
            {"pruning_ratio": [0.25, 0.125]},
            [0.251, 0.126],
            "--pruning_ratio 0.125",
            "the smallest of these cuts, 12.6%",
        ),
        ({"target_bytes": "100MB"}, [0.4], "--target_bytes 100MB", "no more than --target_bytes 100MB asks for"),
        (
            {"pruned_num_hidden_layers": 20, "vocabulary_size": 900},
            [0.1],
            "--pruned_num_hidden_layers 20 --vocabulary_size 900",
            "(10.0% cut). Training has to make up for the cut",
        ),
    ],
)
def test_without_data_the_smallest_cut_is_recommended(
    asked: dict[str, Any], ratios: list[float], flags: str, words: str
) -> None:
    said = recommend(PlanOptions(model_name_or_path="base", **asked), ratios, None)
    assert f"pat tune --model_name_or_path base --dataset_name DATA {flags} --output_dir out (" in said
    assert words in said and "yours is not measured" in said


def test_an_interruption_while_shapes_are_tuned_shows_those_that_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([4.321])

    def tuned_nll(*_: object) -> float:
        if (loss := next(losses, None)) is None:  # as a training that a signal has stopped
            raise Interrupted("SIGTERM has stopped the run; the same command goes on from there.", signal.SIGTERM)
        return loss

    monkeypatch.setattr(scorer, "NUM_TOKENS", 2048)
    monkeypatch.setattr(scorer, "SHARES", (1.0,))
    monkeypatch.setattr(scorer, "SPLITS", (0.5,))
    monkeypatch.setattr(measure, "tuned_nll", tuned_nll)
    flags = ["--model_name_or_path", str(STORIES), "--calibrate", str(DATA), "--shape_search_steps", "2"]
    assert main(["plan", *flags]) == 128 + signal.SIGTERM
    printed = capsys.readouterr()
    assert printed.out == "" and "goes on" not in printed.err
    assert "4.321" in printed.err.partition("Measured until then:")[2]


def test_the_time_that_is_left_never_grows_where_measurements_take_what_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, family = load_config(str(STORIES))
    measuring, state = scorer.ShapeScorer(str(STORIES), str(DATA), config, family), scorer.Phase("", "shapes")
    passed, left = 0.0, list[float]()

    def nll(self: scorer.ShapeScorer, sizes: dict[str, int]) -> float:
        nonlocal passed
        if state.share is not None:
            left.append(passed * (1 - state.share) / state.share)
        passed += self.work(sizes)
        self.num_scored = 1
        return 2.0 + 0.1 * len(sizes)

    monkeypatch.setattr(scorer.ShapeScorer, "nll", nll)
    measuring.run(0.25, state)
    assert left == sorted(left, reverse=True) and len(left) >= 10
    assert state.share == 1.0 and state.done == state.total == len(left) + 1


def test_between_points_a_curve_is_straight() -> None:
    points = (Point({"a": 2}, 0.1, 3.0), Point({"a": 1}, 0.3, 4.0))
    assert interpolated(points, 2.5, 0.05) == pytest.approx(0.25)
    assert interpolated(points, 2.5, 0.2) == pytest.approx(1.0)
    assert interpolated(points, 2.5, 0.6) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--figure", "curves.png"], "Got figure without calibrate"),
        (["--calibrate", "none.jsonl"], "none.jsonl"),
        (["--shape_search_steps", "3"], "Got shape_search_steps without calibrate"),
        (
            ["--calibrate", str(DATA), "--axes", "mlp"],
            "beside axes; it measures all axes of the whole model, so leave them out",
        ),
        (
            ["--calibrate", str(DATA), "--pruning_ratio", "0.1", "0.2"],
            "beside 2 ratios; it measures under one budget, so give one",
        ),
        (
            ["--calibrate", str(DATA), "--figure", "missing/curves.png"],
            "expected a .png file in a folder that is there",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name_or_path", str(STORIES), *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_base_is_the_same_after_every_point_and_no_row_serves_twice() -> None:
    config, family = load_config(str(STORIES))
    measuring = scorer.ShapeScorer(str(STORIES), str(DATA), config, family)
    scored = {tuple(row["input_ids"]) for row in measuring.scored}
    assert scored.isdisjoint(tuple(row["input_ids"]) for row in measuring.rows)
    before = measuring.nll({})
    for sizes in ({"pruned_hidden_size": 48}, {"pruned_intermediate_size": 96}, {"pruned_num_hidden_layers": 4}):
        assert measuring.nll(sizes) > before
        assert measuring.nll({}) == before
