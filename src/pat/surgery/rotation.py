"""The choice of the basis in which channels are counted: PCA of the stream, whole or in a block of equal gain.

RMSNorm commutes with an orthogonal Q once its gain is folded into the readers, so one Q for the whole stream keeps the
function (`docs/adr/0004`). In a tied model the final gain stands between stream and head and cannot be folded into the
shared matrix: there only a block of channels is rotated, whose gain is made equal first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR_SPREAD = 4.0
"""Range of the prior over all channels, in units of the proxy weights. Wide enough for the soft mask to follow the
order well before the milestone, narrow enough for training to swap channels near the cut."""


@dataclass(frozen=True)
class ChannelOrder:
    """Outcome of a calibration, as `UnifiedMask.set_prior` takes it; all tensors have the mask's width d."""

    prior: Tensor
    """Prior order p, `(d,)`: positive for the channels to keep, zero for pinned ones."""
    pinned: Tensor
    """Channels that are never cut, boolean `(d,)`."""
    basis: Tensor | None
    """Orthogonal Q, `(d, d)`, columns by falling energy inside the rotated block; None without rotation."""
    energy_kept: float
    """Share of the (unpinned) energy that the leading channels hold, in [0, 1]."""
    head_factor: Tensor | None = None
    """Factor on the final norm's output, `(d,)`, that makes its gain equal in the rotated block of a tied model."""
    num_tokens: int = 0
    """Number of tokens that were measured."""


def gain_block(gain: Tensor, tolerance: float) -> Tensor:
    """Return the boolean `(d,)` block of channels whose gain lies within `tolerance` (relative) of the median.

    Only gains of the median's sign belong to it, however wide the tolerance: no factor makes a zero equal to another.
    """
    median = gain.median()
    return ((gain - median).abs() <= tolerance * median.abs()) & (gain * median.sign() > 0)


def equalised_gain(gain: Tensor, block: Tensor) -> Tensor:
    """Return the gain `(d,)` with the block's entries replaced by their mean."""
    return torch.where(block, gain[block].mean(), gain)


def equalising_factor(gain: Tensor, block: Tensor) -> Tensor:
    """Return the factor `(d,)` that turns a gain into the equalised one: exactly 1 outside of the block."""
    return torch.where(block, equalised_gain(gain, block) / gain, 1.0)


def pca_order(covariance: Tensor, num_keep: int, block: Tensor | None = None) -> ChannelOrder:
    """Order channels by energy after rotating into the PCA basis.

    Args:
        covariance: second moment of the stream, `(d, d)`, float64.
        num_keep: d', pinned channels included.
        block: channels to rotate, boolean `(d,)`; the others are pinned. None rotates all.
    """
    d = len(covariance)
    rotated = torch.ones(d, dtype=torch.bool) if block is None else block
    rotated = rotated.to(covariance.device)
    where = rotated.nonzero().squeeze(1)
    energy, vectors = torch.linalg.eigh(covariance[where][:, where])
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    basis = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    basis[where.unsqueeze(1), where.unsqueeze(0)] = vectors
    num_free_keep = num_keep - int((~rotated).sum())
    prior = torch.zeros(d, dtype=covariance.dtype, device=covariance.device)
    prior[where] = _ramp(len(where), num_free_keep, d).to(prior)
    return ChannelOrder(prior, ~rotated, basis, _share(energy, num_free_keep))


def importance_order(importance: Tensor, num_keep: int) -> ChannelOrder:
    """Order the channels themselves by a measured importance `(d,)`, ties broken by index."""
    d = len(importance)
    order = torch.sort(importance, descending=True, stable=True).indices
    prior = torch.zeros(d, dtype=importance.dtype, device=importance.device)
    prior[order] = _ramp(d, num_keep, d).to(prior)
    pinned = torch.zeros(d, dtype=torch.bool, device=importance.device)
    return ChannelOrder(prior, pinned, None, _share(importance[order], num_keep))


def _ramp(length: int, num_positive: int, hidden_size: int) -> Tensor:
    """Return falling values with exactly the first `num_positive` above zero, in steps of spread / d."""
    ranks = torch.arange(length, dtype=torch.float64)
    return (num_positive - 0.5 - ranks) * (PRIOR_SPREAD / hidden_size)


def _share(energy: Tensor, num_keep: int) -> float:
    total = energy.sum()
    return float(energy[:num_keep].sum() / total) if total > 0 else 1.0
