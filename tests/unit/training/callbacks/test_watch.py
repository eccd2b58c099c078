"""Tests of the lines that a training prints where there is no live line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pat.training.callbacks import watch
from pat.training.preflight.threads import VARIABLES


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


def test_the_time_to_go_is_that_of_the_steps_lately(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty steps of a slow spell take 50 seconds each, those after it 31: the slow ones no longer count."""
    now = 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    state: Any = SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=True)
    control: Any = SimpleNamespace(should_log=False, should_evaluate=False)
    shown = watch.Watch("Training")
    for step in range(1, 61):
        shown.on_step_begin(None, state, control)
        state.global_step, now = step, now + (50.0 if step <= 40 else 31.0)
        shown.on_step_end(None, state, control)
    lines = capsys.readouterr().err.splitlines()
    assert "step 40 of 100, 50:00 left" in lines[39]
    assert "step 60 of 100, 20:40 left" in lines[59]


@pytest.mark.parametrize(
    ("seconds", "num_threads", "said"),
    [
        ([2.0, 9.0, 9.0, 2.0, 9.0, 9.0], 2, None),  # never three in a row
        ([9.0] * 9, 2, "Steps take 9 seconds, and about 2 were announced"),
        ([9.0] * 9, 1, "something else seems to use this machine."),
        ([7.9] * 9, 2, None),
    ],
)
def test_steps_much_slower_than_announced_are_warned_of_once(
    seconds: list[float],
    num_threads: int,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    slow, args = watch.SlowSteps(2.0), SimpleNamespace(device=torch.device("cpu"), world_size=1)
    unannounced = watch.SlowSteps()
    for taken in seconds:
        slow.note(taken, args)
        unannounced.note(taken, args)
    assert len(caplog.messages) == (said is not None)
    assert said is None or said in caplog.text
    assert ("OMP_NUM_THREADS=1" in caplog.text) == (said is not None and num_threads > 1)
