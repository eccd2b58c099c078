"""What cutting an axis costs, measured on a small model that was trained."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from pat.cli import main
from pat.errors import Interrupted
from pat.plan import measure, scorer
from pat.training.preflight.threads import Threads, restored_threads

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
    monkeypatch.setattr(scorer, "threads_for", lambda *_, **__: Threads(1, 2, 3.0))
    with restored_threads():
        torch.set_num_threads(2)
        assert main(["plan", *flags, "--shape_search_steps", "2"]) == 0
        assert torch.get_num_threads() == 2
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["num_threads"] == 1
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
    assert [row.rpartition(" ")[0] for row in rows] == ["the base,", *["hidden size"] * 2, *["MLP channels"] * 2]


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
