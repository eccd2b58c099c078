"""Least squares that make up for channels that are cut: their order, and their map from those that stay (ADR 0015)."""

from __future__ import annotations

import torch
from torch import Tensor

from pat.surgery.precision import to_float64

RIDGE = 1e-4
"""Ridge of the fit, as a share of the mean diagonal of H[K, K], so that rarely active channels count for little."""


ROUNDS = 16
"""Number of rounds of elimination: 8, 16 and 64 end at 5.288, 5.277 and 5.273 nats on stories260K at 25 %."""


def elimination(moment: Tensor, weight: Tensor, num_keep: int) -> Tensor:
    """Rank the channels before a writer by eliminating them, `(size,)` in float64; the higher, the longer it stays.

    In each round those go whose loss the others make up for best: dropping channel c and refitting the rest changes the
    output by `||w_c||² / (H^-1)_cc` (optimal brain surgery, Hassibi and Stork 1993, on columns). What is left is
    refitted before the next round.

    Args:
        moment: second moment H of the channels, `(size, size)`.
        weight: of the writer, `(d, size)`, in float64.
        num_keep: number of channels that stay.
    """
    moment = to_float64(moment)
    size = len(moment)
    inverse = torch.linalg.inv(moment + _ridge(moment) * torch.eye(size, dtype=moment.dtype, device=moment.device))
    left, rank = torch.arange(size, device=moment.device), torch.zeros(size, dtype=moment.dtype, device=moment.device)
    for remaining in range(ROUNDS, 0, -1):
        score = weight.square().sum(0) / inverse.diagonal()
        goes = score.argsort(stable=True)[: -(-(len(left) - num_keep) // remaining)]
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill_(0, goes, False)
        rank[left[goes]] = size - len(left) + torch.arange(len(goes), dtype=rank.dtype, device=rank.device)
        change = torch.linalg.solve(inverse[goes][:, goes], inverse[goes][:, stays])
        weight = weight[:, stays] - weight[:, goes] @ change
        inverse = inverse[stays][:, stays] - inverse[stays][:, goes] @ change
        left = left[stays]
    score = weight.square().sum(0) / inverse.diagonal()
    rank[left[score.argsort(stable=True)]] = torch.arange(size - len(left), size, dtype=rank.dtype, device=rank.device)
    return rank


def reconstruction(moment: Tensor, keep: Tensor) -> Tensor:
    """Return R = H[D, K] (H[K, K] + ridge)^-1, the map from kept to dropped channels, `(num_dropped, num_kept)`.

    Args:
        moment: second moment H of the channels, `(size, size)`.
        keep: which are kept, boolean `(size,)`.
    """
    moment = to_float64(moment)
    keep = keep.to(moment.device)
    kept, dropped = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
    gram = moment[kept][:, kept]
    gram.diagonal().add_(_ridge(gram))
    return torch.cholesky_solve(moment[kept][:, dropped], torch.linalg.cholesky(gram)).mT


def _ridge(gram: Tensor) -> Tensor:
    return RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
