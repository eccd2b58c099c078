"""How long it takes to measure shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pat.cli import main
from pat.plan import scorer

TESTS = Path(__file__).parents[2]
STORIES, DATA = TESTS / "data" / "stories260K", TESTS / "data" / "instructions.jsonl"


def test_what_it_takes_is_said_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nll(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(scorer.ShapeScorer, "nll", nll)
    flags = ["--model_name_or_path", str(STORIES), "--calibrate", str(DATA), "--shape_search_steps", "7"]
    assert main(["plan", *flags]) == 130
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Expected: ")]
    assert "minute" in said and "12 shapes beside the base" in said and "tuned for 7 steps" in said
