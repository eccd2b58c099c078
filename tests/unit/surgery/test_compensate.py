"""The least-squares map from kept to dropped channels, against torch's own solver."""

from __future__ import annotations

import torch

from pat.surgery.compensate import reconstruction

KEEP = torch.tensor([True, False, True, True, False, True])


def activations(*, num: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.randn(num, 6, generator=generator, dtype=torch.float64) @ mix


def test_it_is_the_regression_of_the_dropped_on_the_kept() -> None:
    a = activations()
    expected = torch.linalg.lstsq(a[:, KEEP], a[:, ~KEEP]).solution.mT
    found = reconstruction((a.mT @ a).float(), KEEP)
    assert found.shape == (2, 4) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)  # the ridge
    error, best = ((a[:, ~KEEP] - a[:, KEEP] @ r.mT).square().sum() for r in (found, expected))
    assert best <= error <= best * 1.001


def test_what_depends_on_the_kept_alone_is_reconstructed_exactly() -> None:
    a = activations()
    matrix = torch.tensor([[1.0, -2.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    a[:, ~KEEP] = a[:, KEEP] @ matrix.mT
    torch.testing.assert_close(reconstruction(a.mT @ a, KEEP), matrix, atol=5e-3, rtol=0)


def test_dead_channels_do_no_harm() -> None:
    a = activations()
    a[:, [0, 1]] = 0.0  # one that is kept and one that is dropped
    found = reconstruction(a.mT @ a, KEEP)
    assert found.isfinite().all() and not found[0].any() and not found[:, 0].any()
    assert not reconstruction(torch.zeros(6, 6), KEEP).any()
