"""The spaces of a model that can be cut, and the cut of those inside a branch.

Every dimension of every weight lies in a space. The residual stream is one, `hidden`; an `mlp` space lies inside each
feed-forward branch, between the rows of its readers and the columns of its writer (docs/adr/0015). Cutting such a space
is a selection, which commutes with everything that `pat.surgery.fold` does to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pat.surgery.adapted import AdaptedMatrix
from pat.surgery.residual import ResidualStream


@dataclass(frozen=True)
class InnerCut:
    """The cut of the space inside one branch: the channels that stay, and how the writer makes up for the others."""

    keep: Tensor
    """Which channels are kept, boolean `(size,)`."""
    reconstruction: Tensor | None = None
    """R `(num_dropped, num_kept)`, see `pat.method.inner`; None drops without a refit."""

    def rows(self, tensor: Tensor) -> Tensor:
        """Cut the first axis, which holds one or several blocks of the space (fused gate and up projections)."""
        size = len(self.keep)
        kept = self.keep.nonzero().squeeze(1).to(tensor.device)
        indices = torch.cat([kept + start for start in range(0, tensor.shape[0], size)])
        return tensor.index_select(0, indices)

    def columns(self, tensor: Tensor) -> Tensor:
        """Cut the last axis: `W[:, K] + W[:, D] R`, in float32 or better if there is an R."""
        keep = self.keep.to(tensor.device)
        if self.reconstruction is None:
            return tensor[..., keep]
        fine = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return fine[..., keep] + fine[..., ~keep] @ self.reconstruction.to(fine)


def cut_inner(
    weight: Callable[[str], Tensor | AdaptedMatrix], stream: ResidualStream, cuts: Mapping[str, InnerCut]
) -> Callable[[str], Tensor | AdaptedMatrix]:
    """Return a function like `weight` whose tensors are cut along the spaces inside the branches.

    Args:
        weight: returns a base parameter by name.
        stream: roles of the parameters.
        cuts: by the path of the branch's writer; a branch without an entry stays as it is.
    """
    rows: dict[str, InnerCut] = {}
    columns: dict[str, InnerCut] = {}
    for branch in stream.branches:
        if (cut := cuts.get(branch.writer.path)) is not None:
            rows |= {name: cut for reader in branch.inner for name in reader.names}
            columns[branch.writer.weight] = cut

    def small(name: str) -> Tensor | AdaptedMatrix:
        given = weight(name)
        if name in rows:
            cut = rows[name].rows
            if isinstance(given, AdaptedMatrix):
                return replace(given, weight=cut(given.weight), up=cut(given.up))
            return cut(given)
        if name in columns:
            cut = columns[name].columns
            if isinstance(given, AdaptedMatrix):
                return replace(given, weight=cut(given.weight), down=cut(given.down))
            return cut(given)
        return given

    return small


def count_parameters_at(
    stream: ResidualStream, shapes: Mapping[str, torch.Size], *, hidden_share: float = 1.0, mlp_share: float = 1.0
) -> int:
    """Count the parameters of a model whose spaces are cut to shares of their sizes.

    Args:
        stream: roles of the parameters.
        shapes: of the base's parameters by name.
        hidden_share: the hidden size that is kept, as a share.
        mlp_share: the MLP channels that are kept, as a share.
    """
    readers = [reader for branch in stream.branches for reader in branch.readers]
    readers += [] if stream.head is None else [stream.head]
    off_stream = {*stream.untouched, *(reader.bias for reader in readers)}
    branches = [branch for branch in stream.branches if branch.kind == "mlp"]
    inner = {name for branch in branches for reader in branch.inner for name in reader.names}
    inner |= {branch.writer.weight for branch in branches}
    shares = {
        name: (1.0 if name in off_stream else hidden_share) * (mlp_share if name in inner else 1.0) for name in shapes
    }
    return round(sum(shapes[name].numel() * share for name, share in shares.items()))
