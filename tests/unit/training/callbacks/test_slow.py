"""Steps that take several times as long as announced are spoken of once, with what helps where something does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pat.training.callbacks import slow
from pat.training.preflight.estimate import RANGE

pytestmark = pytest.mark.usefixtures("two_threads")


def said(
    announced: float,
    steps: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str = "cpu",
) -> list[str]:
    """Return what is said of steps that take so many seconds each, with a minute of scoring between them."""
    now = 100.0
    monkeypatch.setattr(slow.time, "monotonic", lambda: now)
    args: Any = SimpleNamespace(device=torch.device(device))
    state: Any = SimpleNamespace()
    shown = slow.SlowSteps(announced)
    caplog.clear()
    for seconds in steps:
        now += 60
        shown.on_step_begin(args, state, None)
        now += seconds
        shown.on_step_end(args, state, None)
    return list(caplog.messages)


@pytest.mark.parametrize(
    ("announced", "steps", "is_said"),
    [
        (2.0, [2, 50, 50, 50, 50, 50, 50], True),
        (2.0, [50, 50, 2, 50, 50], False),  # not in a row
        (2.0, [slow.SEVERAL * RANGE[1] * 2 - 0.1] * 9, False),
        (0.01, [slow.LEAST_SECONDS - 0.1] * 9, False),
        (0.01, [slow.LEAST_SECONDS + 0.1] * 9, True),
        (0.0, [50] * 9, False),  # nothing was announced
    ],
)
def test_slow_steps_in_a_row_are_said_once(
    announced: float,
    steps: list[float],
    is_said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert len(said(announced, steps, monkeypatch, caplog)) == is_said


def test_what_to_do_is_said_where_there_is_something(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = said(2.0, [50] * 3, monkeypatch, caplog)
    assert line.startswith("The last 3 steps took 50 seconds each, where 2 to 3 seconds a step were announced; other ")
    assert "this CPU. The 2 threads" in line and "Ctrl-C" in line and "OMP_NUM_THREADS=1 in front" in line
    for device, number, variable in (("meta", 2, ""), ("cpu", 1, ""), ("cpu", 2, "2")):
        torch.set_num_threads(number)
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        (line,) = said(2.0, [50] * 3, monkeypatch, caplog, device)
        assert line.endswith(f"seem to use this {'CPU' if device == 'cpu' else 'machine'}.") and "OMP" not in line
