"""Tests of the lines that a training prints where there is no live line."""

from types import SimpleNamespace
from typing import Any

import pytest

from pat.training import watch


def test_a_trainer_that_logs_seldom_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    state: Any = SimpleNamespace(global_step=0, max_steps=9, is_world_process_zero=True)
    shown = watch.Watch("Training")
    for step, seconds in ((1, 20.0), (2, 20.0), (3, 20.0), (4, 20.0)):
        shown.on_step_begin(None, state, None)
        state.global_step, now = step, now + seconds
        shown.on_step_end(None, state, None)
    assert capsys.readouterr().err.splitlines() == [
        "Training: step 2 of 9, 2:20 left",
        "Training: step 4 of 9, 1:40 left",
    ]
