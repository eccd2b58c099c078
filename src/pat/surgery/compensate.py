"""Least squares that make up for what is cut before a writer: its order, and its map from what stays (ADR 0015)."""

from __future__ import annotations

import torch
from torch import Tensor

from pat.surgery.precision import to_float64

RIDGE = 1e-4
"""Ridge of the fit, as a share of the mean diagonal of H[K, K], so that rarely active channels count for little."""


ROUNDS = 16
"""Number of rounds of elimination: 8, 16 and 64 end at 5.288, 5.277 and 5.273 nats on stories260K at 25 %."""


TOKENS_FOR_A_FIT = 2
"""Number of tokens for each channel from which on a moment stands for itself."""


def elimination(moment: Tensor, weight: Tensor, num_keep: int, width: int = 1) -> Tensor:
    """Rank the entries before a writer by eliminating them, `(size,)` in float64; the higher, the longer it stays.

    In each round those go whose loss the others make up for best: dropping entry e, with the columns W_e, and refitting
    the rest changes the output by `tr(W_e ((H^-1)_ee)^-1 W_eᵀ)` (optimal brain surgery, Hassibi and Stork 1993, on
    columns). What is left is refitted before the next round.

    Args:
        moment: second moment H of the channels, `(size * width, size * width)`.
        weight: of the writer, `(d, size * width)`, in float64.
        num_keep: number of entries that stay.
        width: number of channels of an entry, which lie one after another.
    """
    moment = to_float64(moment)
    size = len(moment) // width
    unit = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    inverse = torch.linalg.inv(moment + _ridge(moment) * unit)
    left, rank = torch.arange(size, device=moment.device), torch.zeros(size, dtype=moment.dtype, device=moment.device)
    for remaining in range(ROUNDS, 0, -1):
        score = _losses(weight, inverse, width)
        goes = score.argsort(stable=True)[: -(-(len(left) - num_keep) // remaining)]
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill_(0, goes, False)
        rank[left[goes]] = size - len(left) + torch.arange(len(goes), dtype=rank.dtype, device=rank.device)
        gone, kept = _channels(goes, width), stays.repeat_interleave(width)
        change = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        weight = weight[:, kept] - weight[:, gone] @ change
        inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ change
        left = left[stays]
    score = _losses(weight, inverse, width)
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


def shrink(moment: Tensor, num_tokens: int) -> None:
    """Pull a moment towards a multiple of the unit matrix, in place, where few tokens have made it.

    With no token at all it becomes the unit matrix: entries then count by the norms of their columns, and nothing
    makes up for those that go.

    Args:
        moment: second moment H, `(size, size)`.
        num_tokens: number of tokens in it.
    """
    share = max(0.0, 1 - num_tokens / (TOKENS_FOR_A_FIT * len(moment)))
    mean = moment.diagonal().mean()
    moment.diagonal().add_(share * torch.where(mean > 0, mean, 1.0))


def _losses(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Return what the output loses without each entry, all others refitted, `(size,)`."""
    if width == 1:  # the same without a system of equations for each channel
        return weight.square().sum(0) / inverse.diagonal()
    blocks = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    columns = weight.mT.unflatten(0, (-1, width))
    products: Tensor = columns * torch.linalg.solve(blocks, columns)
    return products.sum((1, 2))


def _channels(entries: Tensor, width: int) -> Tensor:
    """Return the channels of some entries, in the entries' order."""
    return (entries.unsqueeze(1) * width + torch.arange(width, device=entries.device)).flatten()


def _ridge(gram: Tensor) -> Tensor:
    return RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
