"""Tests of the lines that a training prints where there is no live line."""

from types import SimpleNamespace
from typing import Any

import pytest

from pat.training.callbacks import watch


def test_each_step_has_at_most_one_line_with_its_own_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps take 20 seconds: the second is told of because a while has passed, the others as they are logged."""
    now = 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    state: Any = SimpleNamespace(global_step=0, max_steps=9, is_world_process_zero=True)
    shown = watch.Watch("Training")
    for step in range(1, 7):
        logged, scored = step in (3, 4, 6), step in (4, 5)
        control: Any = SimpleNamespace(should_log=logged, should_evaluate=scored)
        shown.on_step_begin(None, state, control)
        state.global_step, now = step, now + 20.0
        shown.on_step_end(None, state, control)
        if logged:
            shown.on_log(None, state, control, logs={"loss": step / 2})
        if scored:
            shown.on_prediction_step(None, state, control)
            shown.on_log(None, state, control, logs={"eval_loss": step / 4})
    assert capsys.readouterr().err.splitlines() == [
        "Training: step 2 of 9, 2:20 left",
        "Training: step 3 of 9, 2:00 left, loss 1.500",
        "Training: step 4 of 9, 1:40 left, loss 2.000, held-out loss 1.000",
        "Training: step 5 of 9, 1:20 left, held-out loss 1.250",
        "Training: step 6 of 9, 1:00 left, loss 3.000",
    ]


def test_a_slow_spell_is_soon_forgotten_and_scoring_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten steps of 50 seconds, then of 2; after every fifth step 30 seconds of scoring, 6 a step."""
    now = 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    state: Any = SimpleNamespace(global_step=0, max_steps=60, is_world_process_zero=True)
    control: Any = SimpleNamespace(should_log=True, should_evaluate=False)
    shown = watch.Watch("Training")
    left = {}
    for step in range(1, 42):
        now += 30.0 if step % 5 == 1 and step > 1 else 0.0
        shown.on_step_begin(None, state, control)
        state.global_step, now = step, now + (50.0 if step <= 10 else 2.0)
        shown.on_step_end(None, state, control)
        shown.on_log(None, state, control, logs={"loss": 1.0})
        minutes, seconds = capsys.readouterr().err.partition(" left")[0].rpartition(", ")[2].split(":")
        left[step] = (60 * int(minutes) + int(seconds)) / (60 - step)
    assert left[10] == pytest.approx(50 + 30 / 9, abs=0.1)
    assert left[15] == pytest.approx(26 + 60 / 14, abs=0.1)  # half of the last ten were slow
    assert left[20] == pytest.approx(2 + 90 / 19, abs=0.1) and left[41] == pytest.approx(2 + 6, abs=0.1)
