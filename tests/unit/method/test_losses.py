"""The two regularisers: values, gradients by finite differences in float64, and behaviour at their zeros."""

import math

import pytest
import torch
from torch import Tensor, nn

from pat.method.losses import NORM_EPSILON, active_channel_loss, orthogonality_loss
from pat.method.operator import DenseOperator, LowRankOperator


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# -- identity loss ---------------------------------------------------------------------------------------------------


def test_orthogonality_loss_is_the_smoothed_frobenius_norm() -> None:
    rows = random(3, 5).tolist()
    total = 0.0
    for i in range(3):
        for j in range(3):
            dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
            total += (dot - (i == j)) ** 2
    loss = orthogonality_loss(torch.tensor(rows, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.sqrt(total + 1e-8), rel=1e-14)
    assert NORM_EPSILON == 1e-8


def test_orthogonality_loss_gradient_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(orthogonality_loss, random(4, 7).requires_grad_())
    near_zero = torch.eye(4, 7, dtype=torch.float64) + 1e-3 * random(4, 7)
    # Steps well below the distance 1e-3 from the zero, where the norm's curvature is high.
    assert torch.autograd.gradcheck(orthogonality_loss, near_zero.requires_grad_(), eps=1e-7, atol=1e-4)


def test_the_smoothed_norm_has_zero_gradient_at_its_zero() -> None:
    rows = torch.eye(4, 7, dtype=torch.float64).requires_grad_()
    orthogonality_loss(rows).backward()
    assert torch.count_nonzero(rows.grad) == 0


def test_rounding_of_a_fresh_operator_gives_no_unit_gradient() -> None:
    """The reason for the smoothing: in float32 the bare norm's gradient at initialisation has size one."""
    operator = LowRankOperator(64, 8)
    operator.identity_loss().backward()
    smoothed = operator.down.grad.norm().item()

    bare = operator.down.detach().clone().requires_grad_()
    (bare @ bare.mT - torch.eye(8)).norm().backward()
    assert bare.grad.norm().item() > 0.5
    assert smoothed < 0.05


# -- identity loss of the operators ----------------------------------------------------------------------------------


def test_low_rank_identity_loss_counts_both_factors() -> None:
    operator = LowRankOperator(10, 3).double()
    with torch.no_grad():
        operator.down.copy_(random(3, 10, seed=1))
        operator.up.copy_(random(10, 3, seed=2))
    down, up = operator.down.detach(), operator.up.detach()
    expected = sum(
        math.sqrt((gram - torch.eye(3, dtype=torch.float64)).square().sum().item() + 1e-8)
        for gram in (down @ down.T, up.T @ up)
    )
    assert operator.identity_loss().item() == pytest.approx(expected, rel=1e-14)


def _identity_loss(operator: nn.Module, name: str, value: Tensor) -> Tensor:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.operator = operator

        def forward(self) -> Tensor:
            return operator.identity_loss()

    return torch.func.functional_call(Loss(), {f"operator.{name}": value}, ())


@pytest.mark.parametrize("name", ["down", "up"])
def test_low_rank_identity_loss_gradient_by_finite_differences(name: str) -> None:
    operator = LowRankOperator(7, 3).double()
    value = random(*getattr(operator, name).shape, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: _identity_loss(operator, name, v), value)


def test_dense_identity_loss_is_the_distance_of_d_from_orthogonality() -> None:
    operator = DenseOperator(5).double()
    assert operator.identity_loss().item() == pytest.approx(1e-4)  # sqrt(1e-8)
    with torch.no_grad():
        operator.matrix.copy_(random(5, 5))
    d = torch.eye(5, dtype=torch.float64) + operator.matrix.detach()
    expected = math.sqrt((d @ d.T - torch.eye(5, dtype=torch.float64)).square().sum().item() + 1e-8)
    assert operator.identity_loss().item() == pytest.approx(expected, rel=1e-14)
    value = random(5, 5, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: _identity_loss(operator, "matrix", v), value)


# -- active-channel loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_positive", "target"), [(0, 4), (2, 4), (4, 4), (7, 4), (10, 4)])
def test_active_channel_loss_is_the_absolute_difference_of_counts(num_positive: int, target: int) -> None:
    logits = torch.full((10,), -0.25, dtype=torch.float64)
    logits[:num_positive] = 0.75
    assert active_channel_loss(logits, target).item() == pytest.approx(abs(target - num_positive), abs=1e-15)


def test_a_proxy_weight_of_exactly_zero_is_not_active() -> None:
    assert active_channel_loss(torch.zeros(6), 4).item() == 4


@pytest.mark.parametrize(("target", "sign"), [(2, +1.0), (8, -1.0)])
def test_straight_through_gradient_equals_that_of_its_surrogate(target: int, sign: float) -> None:
    """The surrogate replaces the step by the identity around the point: |N - (count + sum(w - w0))|."""
    point = random(10)
    count = int((point > 0).sum())
    assert 2 < count < 8
    logits = point.clone().requires_grad_()
    active_channel_loss(logits, target).backward()

    def surrogate(w: Tensor) -> Tensor:
        return (target - (count + (w - point).sum())).abs()

    step = 1e-6
    for index in range(10):
        up, down = point.clone(), point.clone()
        up[index] += step
        down[index] -= step
        numeric = (surrogate(up) - surrogate(down)) / (2 * step)
        assert logits.grad[index].item() == pytest.approx(numeric.item(), rel=1e-8)
        assert logits.grad[index].item() == sign  # too many active channels: every proxy weight is pushed down


def test_there_is_no_pull_once_the_count_is_right() -> None:
    logits = torch.tensor([1.0, 2.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    active_channel_loss(logits, 2).backward()
    assert torch.count_nonzero(logits.grad) == 0
