"""What fills in for channels that are cut: the least-squares map from those that stay (docs/adr/0015)."""

from __future__ import annotations

import torch
from torch import Tensor

from pat.surgery.precision import to_float64

RIDGE = 1e-4
"""Ridge of the fit, as a share of the mean diagonal of H[K, K], so that rarely active channels count for little."""


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
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny))
    return torch.cholesky_solve(moment[kept][:, dropped], torch.linalg.cholesky(gram)).mT
