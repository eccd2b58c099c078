"""Choosing the basis: PCA, the block of a tied model, the order without a rotation."""

import pytest
import torch
from torch import Tensor

from pat.surgery.rotation import (
    ChannelOrder,
    equalised_gain,
    equalising_factor,
    gain_block,
    importance_order,
    pca_order,
)

HIDDEN, KEPT = 10, 7


def covariance(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(50, HIDDEN, dtype=torch.float64, generator=generator) * torch.arange(1, HIDDEN + 1)
    return rows.mT @ rows / 50


def check_prior(order: ChannelOrder, num_positive: int) -> None:
    free = order.prior[~order.pinned]
    assert int((free > 0).sum()) == num_positive  # so that the active-channel loss starts at zero
    assert not (free == 0).any()
    assert not order.prior[order.pinned].any()
    steps = free.sort(descending=True).values.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -4.0 / HIDDEN), atol=1e-12, rtol=0)


def test_pca_of_the_whole_stream() -> None:
    matrix = covariance()
    order = pca_order(matrix, KEPT)
    q = order.basis
    torch.testing.assert_close(q.mT @ q, torch.eye(HIDDEN, dtype=torch.float64), atol=1e-12, rtol=0)
    rotated = q.mT @ matrix @ q
    energy = rotated.diagonal()
    torch.testing.assert_close(rotated, torch.diag(energy), atol=1e-9, rtol=0)
    assert (energy.diff() < 0).all()
    assert order.energy_kept == pytest.approx((energy[:KEPT].sum() / energy.sum()).item())
    assert not order.pinned.any()
    assert (order.prior.diff() < 0).all()
    check_prior(order, KEPT)


def test_pca_of_a_block_leaves_the_other_channels_alone_and_pins_them() -> None:
    matrix = covariance()
    block = torch.ones(HIDDEN, dtype=torch.bool)
    block[[2, 9]] = False
    order = pca_order(matrix, KEPT, block)
    q = order.basis
    assert order.pinned.nonzero().flatten().tolist() == [2, 9]
    torch.testing.assert_close(q.mT @ q, torch.eye(HIDDEN, dtype=torch.float64), atol=1e-12, rtol=0)
    for outlier in (2, 9):
        unit = torch.zeros(HIDDEN, dtype=torch.float64)
        unit[outlier] = 1
        assert torch.equal(q[:, outlier], unit) and torch.equal(q[outlier], unit)
    inner = (q.mT @ matrix @ q)[block][:, block]
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-9, rtol=0)
    assert (inner.diagonal().diff() < 0).all()
    check_prior(order, KEPT - 2)  # the pinned ones count towards the target


def test_a_rotated_block_commutes_with_an_equalised_gain() -> None:
    """The reason for the block: Q diag(g) = diag(g) Q."""
    gain = torch.tensor([1.0, 1.1, 0.9, 5.0, 1.0, 0.95, 1.05, 0.1, 1.0, 1.02], dtype=torch.float64)
    block = gain_block(gain, 0.15)
    assert block.logical_not().nonzero().flatten().tolist() == [3, 7]
    even = equalised_gain(gain, block)
    assert torch.equal(even[~block], gain[~block])
    assert even[block].unique().tolist() == [pytest.approx(gain[block].mean().item())]
    q = pca_order(covariance(), KEPT, block).basis
    torch.testing.assert_close(q @ torch.diag(even), torch.diag(even) @ q, atol=1e-12, rtol=0)


def test_the_tolerance_is_relative_to_the_median_whatever_its_sign() -> None:
    gain = torch.tensor([-10.0, -10.5, -9.0, -12.0, 10.0])
    assert gain_block(gain, 0.11).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("tolerance", [0.15, 1.5])
def test_a_channel_without_gain_stays_as_it_is(tolerance: float) -> None:
    gain = torch.tensor([1.0, 1.1, 0.0, 0.9, -0.2, 1.0], dtype=torch.float64)
    block = gain_block(gain, tolerance)
    assert not block[2]
    factor = equalising_factor(gain, block)
    assert factor[~block].tolist() == [1.0] * int((~block).sum())
    torch.testing.assert_close(factor * gain, equalised_gain(gain, block), atol=1e-15, rtol=0)


def test_importance_order_keeps_the_channels_and_breaks_ties_by_index() -> None:
    importance = torch.tensor([0, 3, 1, 3, 9, 1, 1, 0, 2, 0], dtype=torch.float64)
    order = importance_order(importance, KEPT)
    assert order.basis is None and not order.pinned.any()
    ranking = order.prior.argsort(descending=True).tolist()
    assert ranking == [4, 1, 3, 8, 2, 5, 6, 0, 7, 9]
    assert order.energy_kept == pytest.approx(1.0)
    check_prior(order, KEPT)


def test_a_silent_stream_still_has_an_order() -> None:
    zero = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    assert pca_order(zero, KEPT).energy_kept == 1.0
    check_prior(importance_order(zero[0], KEPT), KEPT)
