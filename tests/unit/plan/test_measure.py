"""What cutting an axis costs, measured on a small model that was trained."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pat.cli import main
from pat.errors import Interrupted
from pat.loading import load_config
from pat.plan import measure
from pat.plan.curves import Point, interpolated

TESTS = Path(__file__).parents[2]
STORIES, DATA = TESTS / "data" / "stories260K", TESTS / "data" / "instructions.jsonl"


def test_curves_rise_and_candidates_meet_the_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "NUM_TOKENS", 4096)
    monkeypatch.setattr(measure, "SPLITS", (0.5,))
    monkeypatch.setattr(measure, "NUM_PAIRS", 1)
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
    assert figure.stat().st_size > 10_000


def test_an_interruption_shows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = measure._Bench.nll

    def nll(self: measure._Bench, sizes: dict[str, int]) -> float:
        if len(self.losses) == 5:
            raise KeyboardInterrupt
        return score(self, sizes)

    monkeypatch.setattr(measure._Bench, "nll", nll)
    assert main(["plan", "--model_name_or_path", str(STORIES), "--calibrate", str(DATA), "--json"]) == 130
    printed = capsys.readouterr()
    assert printed.out == ""  # a plan or nothing
    assert printed.err.splitlines()[-1] == "pat: interrupted"
    table = printed.err.partition("Measured until then:")[2]
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert [row.rpartition(" ")[0] for row in rows] == ["", *["hidden size"] * 2, *["MLP channels"] * 2]


def test_an_interruption_while_shapes_are_tuned_shows_those_that_were(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([4.321])

    def tuned_nll(*_: object) -> float:
        if (loss := next(losses, None)) is None:  # as a training that a signal has stopped
            raise Interrupted("SIGTERM has stopped the run; the same command goes on from there.", signal.SIGTERM)
        return loss

    monkeypatch.setattr(measure, "NUM_TOKENS", 2048)
    monkeypatch.setattr(measure, "SHARES", (1.0,))
    monkeypatch.setattr(measure, "SPLITS", (0.5,))
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
    bench, state = measure._Bench(str(STORIES), str(DATA), config, family), measure.Phase("", "shapes")
    passed, left = 0.0, list[float]()

    def nll(self: measure._Bench, sizes: dict[str, int]) -> float:
        nonlocal passed
        if state.share is not None:
            left.append(passed * (1 - state.share) / state.share)
        passed += self.work(sizes)
        self.num_scored = 1
        return 2.0 + 0.1 * len(sizes)

    monkeypatch.setattr(measure._Bench, "nll", nll)
    bench.run(0.25, state)
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
    bench = measure._Bench(str(STORIES), str(DATA), config, family)
    scored = {tuple(row["input_ids"]) for row in bench.scored}
    assert scored.isdisjoint(tuple(row["input_ids"]) for row in bench.rows)
    before = bench.nll({})
    for sizes in ({"pruned_hidden_size": 48}, {"pruned_intermediate_size": 96}, {"pruned_num_hidden_layers": 4}):
        assert bench.nll(sizes) > before
        assert bench.nll({}) == before
