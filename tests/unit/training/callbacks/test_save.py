"""Where nothing says when to save, a checkpoint is never older than some minutes, and saving takes a small share."""

from types import SimpleNamespace
from typing import Any

import pytest

from pat.training.arguments import build_arguments
from pat.training.callbacks import save
from pat.training.callbacks.save import NUM_KEPT, SECONDS_BETWEEN, SHARE, SaveByTime, saving


def steps_saved(step: float, each: float, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the steps that are saved where a step and a checkpoint take so many seconds, and scoring 100."""
    now, saved = 0.0, list[int]()
    monkeypatch.setattr(save.time, "monotonic", lambda: now)
    callback, none = SaveByTime(), SimpleNamespace()
    state: Any = none
    for number in range(1, num_steps + 1):
        control: Any = SimpleNamespace(should_save=False)
        now += step
        callback.on_step_end(none, state, control)
        if not control.should_save:
            continue
        now += 100
        callback.on_evaluate(none, state, control)
        now += each
        callback.on_save(none, state, control)
        saved.append(number)
    return saved


def test_a_step_ends_with_a_checkpoint_when_the_last_one_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    every = round(SECONDS_BETWEEN / 30)
    assert steps_saved(30.0, 1.0, 3 * every, monkeypatch) == [every, 2 * every, 3 * every]
    assert steps_saved(30.0, 1.0, every - 1, monkeypatch) == []


def test_a_checkpoint_that_takes_long_is_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = steps_saved(30.0, 30.0, 50, monkeypatch)
    assert (second - first) * 30 == 30 / SHARE


@pytest.mark.parametrize(
    ("flags", "saves", "limit"),
    [
        ({}, True, NUM_KEPT),
        ({"save_total_limit": 5}, True, 5),
        ({"save_steps": 500}, False, None),  # given, if only the default
        ({"save_strategy": "no"}, False, None),
        ({"save_only_model": True}, False, None),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 50}, False, None),
        ({"keep_checkpoints": True}, False, None),
    ],
)
def test_what_is_asked_for_is_left_alone(flags: dict[str, Any], saves: bool, limit: int | None) -> None:
    arguments = build_arguments(model_name_or_path="base", dataset_name="rows.jsonl", output_dir="out", **flags)
    assert (len(saving(arguments)), arguments.sft.save_total_limit) == (saves, limit)
