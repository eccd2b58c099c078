"""The guard against non-finite gradients: what it raises at, and what it leaves to a float16 loss scaler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pat.errors import RunFailed
from pat.training.callbacks.guard import MAX_SKIPPED_STEPS, FiniteGuard


def step(guard: FiniteGuard, value: float, *, fp16: bool = False) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.grad = torch.ones(3, 3)
    model[1].bias.grad = torch.tensor([1.0, value, 1.0])
    guard.on_pre_optimizer_step(SimpleNamespace(fp16=fp16), SimpleNamespace(global_step=7), None, model=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_gradient_that_is_not_finite_stops_the_run(value: float) -> None:
    with pytest.raises(RunFailed, match=r"non-finite at step 7; .*--learning_rate"):
        step(FiniteGuard(), value)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
def test_finite_gradients_pass_however_large(value: float) -> None:
    step(FiniteGuard(), value)


def test_a_model_without_gradients_passes() -> None:
    guard = FiniteGuard()
    guard.on_pre_optimizer_step(SimpleNamespace(fp16=False), SimpleNamespace(global_step=0), None, model=nn.Identity())


def test_an_engine_that_has_stepped_says_which_step_it_left_out() -> None:
    args, state, optimizer = SimpleNamespace(fp16=False), SimpleNamespace(global_step=4), SimpleNamespace()
    optimizer.step_was_skipped = False
    FiniteGuard().on_pre_optimizer_step(args, state, None, model=nn.Linear(3, 3), optimizer=optimizer)
    optimizer.step_was_skipped = True
    with pytest.raises(RunFailed, match="non-finite at step 4"):
        FiniteGuard().on_pre_optimizer_step(args, state, None, model=nn.Linear(3, 3), optimizer=optimizer)


def test_steps_that_a_loss_scaler_skips_pass_unless_it_skips_nothing_else() -> None:
    guard = FiniteGuard()
    for _ in range(2):
        for _ in range(MAX_SKIPPED_STEPS - 1):
            step(guard, float("inf"), fp16=True)
        step(guard, 1.0, fp16=True)
    for _ in range(MAX_SKIPPED_STEPS - 1):
        step(guard, float("nan"), fp16=True)
    with pytest.raises(RunFailed, match=rf"for {MAX_SKIPPED_STEPS} steps in a row.*bf16"):
        step(guard, float("nan"), fp16=True)
