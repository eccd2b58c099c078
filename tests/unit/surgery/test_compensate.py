"""The least-squares map from kept to dropped channels, against torch's own solver."""

from __future__ import annotations

import itertools

import torch

from pat.surgery.compensate import elimination, reconstruction

KEEP = torch.tensor([True, False, True, True, False, True])


def test_groups_go_whole_by_what_all_their_channels_lose_together() -> None:
    generator = torch.Generator().manual_seed(3)
    size, width = 5, 3
    a = torch.randn(400, size * width, generator=generator, dtype=torch.float64)
    a[:, :3] = a[:, 3:6] @ torch.randn(3, 3, generator=generator, dtype=torch.float64) + 0.01 * a[:, :3]
    weight = torch.randn(4, size * width, generator=generator, dtype=torch.float64)
    moment = a.mT @ a

    def lost(group: int) -> float:
        keep = torch.ones(size, dtype=torch.bool)
        keep[group] = False
        channels = keep.repeat_interleave(width)
        refitted = weight[:, channels] + weight[:, ~channels] @ reconstruction(moment, channels)
        return float((a @ weight.mT - a[:, channels] @ refitted.mT).square().sum())

    rank = elimination(moment, weight, size - 1, width)
    assert int(rank.argmin()) == min(range(size), key=lost) in (0, 1)
    assert torch.equal(elimination(moment, weight, 7, 1), elimination(moment, weight, 7))


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


def loss(a: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> float:
    """What a cut with its refit does to the writer's output, summed over tokens."""
    solution = torch.linalg.lstsq(a[:, keep], a @ weight.mT).solution
    return float((a @ weight.mT - a[:, keep] @ solution).square().sum())


def test_elimination_cuts_what_the_others_make_up_for() -> None:
    # Channel 0 is the largest and a copy of channel 1 with a little noise: energy would keep both.
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    a[:, 0] = 3 * a[:, 1] + 0.01 * a[:, 0]
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    rank = elimination(a.mT @ a, weight, 5)
    assert sorted(rank.tolist()) == list(range(6)) and int(rank.argmin()) in (0, 1)


def test_elimination_comes_close_to_the_best_of_all_cuts() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        a = activations(seed=seed)
        weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        found = torch.zeros(6, dtype=torch.bool)
        found[elimination(a.mT @ a, weight, 3).topk(3).indices] = True
        cuts = [torch.tensor([i in kept for i in range(6)]) for kept in itertools.combinations(range(6), 3)]
        best = sorted(cuts, key=lambda keep: loss(a, weight, keep))[:3]
        # By the cuts themselves: the last digits of a loss differ by where its numbers lie in memory.
        assert any(torch.equal(found, keep) for keep in best)
