"""Fold operators, gains and a rotation into weights and cut the residual axes: the exact merge.

These are pure functions of tensors, for the merge of `docs/adr/0004` and `docs/adr/0005`. Notation: d and d' are the
widths before and after, K the kept channels, Q the basis of the mask (None: the channels themselves), `D` an operator.
All arithmetic is float64 unless asked otherwise, and every result is rounded once. Matrices are folded a few vectors of
the stream at a time: a vocabulary of 32,000 by 4,096 channels would take a gigabyte in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pat.families import Family
from pat.surgery.adapted import AdaptedMatrix, merged
from pat.surgery.precision import lift, to_float64
from pat.surgery.residual import Linear, ResidualBranch, ResidualStream

CHUNK_ELEMENTS = 2**20
"""Number of elements of a matrix that are folded at once: 8 MB in float64."""


class Operator(Protocol):
    """An operator D as folding needs it: its action and its transpose's, on rows of shape `(..., d)`."""

    def change(self, y: Tensor) -> Tensor:
        """Return (D - I) y."""
        ...

    def change_transposed(self, y: Tensor) -> Tensor:
        """Return (Dᵀ - I) y."""
        ...

    def add_change(self, total: Tensor, y: Tensor) -> Tensor:
        """Add (D - I) y to `total` in place and return it, for `y` of shape `(n, d)`."""
        ...

    def cut_outputs(self, cut: Callable[[Tensor], Tensor]) -> Operator:
        """Return an operator whose `change` is already cut, for a linear map `cut` of rows `(..., d)`."""
        ...


@dataclass(frozen=True)
class Channels:
    """The map from d to d' residual channels: a selection, or a rotation followed by one."""

    hidden_size: int
    keep: Tensor
    """Kept channels K, ascending, of shape `(d',)`."""
    basis: Tensor | None = None
    """Q_K = Q[:, K] of shape `(d, d')` in float64, or None for a plain selection."""

    @classmethod
    def from_mask(cls, keep: Tensor, basis: Tensor | None) -> Channels:
        """Build from a boolean mask `(d,)` and the full basis Q `(d, d)`."""
        indices = keep.nonzero().squeeze(1)
        return cls(len(keep), indices, None if basis is None else to_float64(basis[:, indices]))

    def to(self, precision: torch.dtype) -> Channels:
        """Return the same map with its basis in another dtype."""
        return self if self.basis is None else replace(self, basis=self.basis.to(precision))

    @property
    def pruned_hidden_size(self) -> int:
        """d', the number of kept channels."""
        return len(self.keep)

    @property
    def gain(self) -> float:
        """sqrt(d/d'), by which an RMSNorm over the kept channels must be amplified."""
        return math.sqrt(self.hidden_size / self.pruned_hidden_size)

    def cut(self, rows: Tensor) -> Tensor:
        """Map the last axis from d to d': `rows[..., K]`, or `rows @ Q_K`."""
        return self.select(rows) if self.basis is None else rows @ self.basis.to(rows.device)

    def select(self, rows: Tensor) -> Tensor:
        """Return `rows[..., K]`, whatever device they are on."""
        keep = self.keep.to(rows.device)
        if rows.dim() > 1 and rows.stride(-1) > rows.stride(-2):  # a writer, whose rows lie one by one
            return rows.mT.index_select(-2, keep).mT
        return rows.index_select(-1, keep)


@dataclass(frozen=True)
class HeadPlan:
    """The treatment of the two ends of the stream."""

    tied: bool
    """One matrix serves embedding and head, carrying the embedding's operator on both ends."""
    final_gain: Tensor | None = None
    """Gain of the final norm in place of the stored one (tied rotation: equalised in the rotated block), `(d,)`."""
    embedding_ratio: float = 1.0
    """Factor by which the model's own scale on its embeddings shrinks (families that multiply by sqrt(hidden size)):
    about sqrt(d/d'), exactly the ratio of the scales as the two models round them."""


@dataclass(frozen=True)
class _Fold:
    """One merge: where weights come from, and in which dtypes they are folded and handed on."""

    weight: Callable[[str], Tensor | AdaptedMatrix]
    channels: Channels
    precision: torch.dtype
    dtype: torch.dtype

    def load(self, name: str) -> Tensor:
        """Return a vector, or a matrix to be left as it is, in float64; nothing is gained by less."""
        return to_float64(merged(self.weight(name)))

    def vector(self, tensor: Tensor) -> Tensor:
        """Round a folded vector."""
        return tensor.to(self.dtype)

    def writer(self, operator: Operator | None) -> Callable[[Tensor], Tensor]:
        """Return what applies D and the cut to vectors in the residual stream, `(..., d)` -> `(..., d')`."""
        cut = self.channels.cut
        if operator is None:
            return cut
        short = operator.cut_outputs(cut)  # the channels that go need not be computed
        return lambda rows: short.add_change(cut(rows), rows)  # what is cut is a copy

    def matrix(
        self, weight: Tensor | AdaptedMatrix, cut: Callable[[Tensor], Tensor] | None, *, writer: bool = False
    ) -> Tensor:
        """Cut a matrix or a stack of them, some residual vectors at a time.

        Args:
            weight: `(..., n, d)`, of a writer `(..., d, n)`.
            cut: maps vectors `(m, d)` to `(m, d')`, row by row; None for a mere selection, which needs no precision.
            writer: whether the residual vectors are the columns.
        """
        vectors = weight.mT if writer else weight
        *stack, num_rows, width = vectors.shape
        small = self.channels.pruned_hidden_size
        shape = (*stack, small, num_rows) if writer else (*stack, num_rows, small)
        stored = weight.weight if isinstance(weight, AdaptedMatrix) else weight
        result = torch.empty(shape, dtype=self.dtype, device=lift(stored.new_empty(0), self.precision).device)
        target = result.mT if writer else result
        step = max(1, CHUNK_ELEMENTS // width)
        if isinstance(vectors, AdaptedMatrix):
            vectors = vectors.to(self.precision)
            vectors = vectors.columns(self.channels.select) if cut is None else vectors
            for start in range(0, num_rows, step):
                rows = vectors.rows(start, start + step)
                target[start : start + step] = rows if cut is None else cut(rows)
            return result
        for index in itertools.product(*map(range, stack)):
            for start in range(0, num_rows, step):
                rows = vectors[index][start : start + step]
                # Picking numbers of 16 bits takes five times as long as picking those of 32.
                fine = torch.promote_types(rows.dtype, torch.float32) if cut is None else self.precision
                rows = (cut or self.channels.select)(lift(rows, fine))
                target[index][start : start + step] = rows
        return result


def fold_weights(
    stream: ResidualStream,
    weight: Callable[[str], Tensor | AdaptedMatrix],
    channels: Channels,
    operators: Mapping[str, Operator],
    plan: HeadPlan,
    *,
    precision: torch.dtype = torch.float64,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of the small dense model, one at a time.

    Args:
        stream: roles of the parameters; `stream.head` must be None exactly if `plan.tied`.
        weight: returns a base parameter by name, with adapters other than the operators merged in, or beside it.
        channels: the map of the residual channels.
        operators: D by site (see `ResidualStream.sites`); a site without an entry has the identity. Each is asked for
            once, when its site is folded.
        plan: treatment of embedding, final norm and head.
        precision: in which matrices are folded; the operators must be in it.
        dtype: of the results, rounded once; by default `precision`.

    Yields:
        (name in the base model, contiguous tensor of the new shape). A tied head is not yielded.
    """
    family = stream.family
    fold = _Fold(weight, channels.to(precision), precision, dtype or precision)
    channels = fold.channels

    name, write = f"{stream.embedding}.weight", fold.writer(operators.get(stream.embedding))
    yield name, fold.matrix(weight(name), lambda rows: write(rows) * plan.embedding_ratio)

    qk_scaled = stream.scaled_projections()
    for branch in stream.branches:
        gain = None if branch.pre_norm is None else _gain(fold, branch.pre_norm, family)
        folded_gain = gain if channels.basis is not None else None
        for reader in branch.readers:
            # c q / sqrt(c² mean(q²) + eps d/d') is the old q-norm for c² = d/d': these norms share the grown epsilon.
            factor = channels.gain if reader.path in qk_scaled else 1.0
            yield from _fold_reader(reader, fold, folded_gain, factor, normed=branch.pre_norm is not None)
        # In the order in which a model runs and is stored, so that the disk can be asked for what comes next.
        yield from _fold_writer(branch, fold, operators.get(branch.site))
        if branch.pre_norm is not None and gain is not None:
            yield f"{branch.pre_norm}.weight", fold.vector(_new_gain(gain, channels, family))
        if branch.post_norm is not None:
            post_gain = _gain(fold, branch.post_norm, family)
            yield f"{branch.post_norm}.weight", fold.vector(_new_gain(post_gain, channels, family))

    yield from _fold_ends(stream, fold, plan)
    for name in stream.untouched:
        yield name, fold.vector(fold.load(name))


def cut_writer_rows(rows: Tensor, operator: Operator | None, channels: Channels) -> Tensor:
    """Apply D and the cut to vectors in the residual stream, `(..., d)` -> `(..., d')`: an embedding, a bias."""
    return channels.cut(rows if operator is None else rows + operator.change(rows))


def _fold_writer(branch: ResidualBranch, fold: _Fold, operator: Operator | None) -> Iterator[tuple[str, Tensor]]:
    # A writer's rows lie in the stream: W is (d, in), experts are (num_experts, d, in).
    cut = fold.writer(operator)
    yield branch.writer.weight, fold.matrix(fold.weight(branch.writer.weight), cut, writer=True)
    if branch.writer.bias is not None:
        bias = fold.load(branch.writer.bias).to(fold.precision)
        yield branch.writer.bias, fold.vector(cut(bias.unsqueeze(0)).squeeze(0))


def _fold_reader(
    reader: Linear, fold: _Fold, folded_gain: Tensor | None, factor: float, *, normed: bool
) -> Iterator[tuple[str, Tensor]]:
    channels = fold.channels
    # In a rotated stream the gain cannot stay in the norm: W diag(g) Q_K, and sqrt(d/d') beside it because a
    # gain of 1 is exact in every dtype.
    scale = None if folded_gain is None else (folded_gain * (channels.gain if normed else 1.0)).to(fold.precision)

    def cut(rows: Tensor) -> Tensor:
        return channels.cut(rows if scale is None else rows * scale.to(rows.device)) * factor

    plain = channels.basis is None and scale is None and factor == 1.0
    yield reader.weight, fold.matrix(fold.weight(reader.weight), None if plain else cut)
    if reader.bias is not None:
        yield reader.bias, fold.vector(fold.load(reader.bias) * factor)


def _fold_ends(stream: ResidualStream, fold: _Fold, plan: HeadPlan) -> Iterator[tuple[str, Tensor]]:
    family, channels = stream.family, fold.channels
    name = f"{stream.final_norm}.weight"
    gain = to_float64(plan.final_gain) if plan.final_gain is not None else _gain(fold, stream.final_norm, family)
    if plan.tied:
        # The gain stays in the norm (tied block form: it is constant on the rotated block, so K may index it).
        # The factor that E' carries for the model's own embedding scale reaches the logits too: take it back here.
        kept = channels.select(gain) * (channels.gain / plan.embedding_ratio)
        yield name, fold.vector(kept - family.gain_offset)
        return
    assert stream.head is not None, "an untied head has a weight of its own"
    yield from _fold_reader(stream.head, fold, gain if channels.basis is not None else None, 1.0, normed=True)
    yield name, fold.vector(_new_gain(gain, channels, family))


def _gain(fold: _Fold, norm: str, family: Family) -> Tensor:
    """Return the gain a norm multiplies by, `(d,)`, whatever way it is stored."""
    return fold.load(f"{norm}.weight") + family.gain_offset


def _new_gain(gain: Tensor, channels: Channels, family: Family) -> Tensor:
    """Return the stored weight of a norm after the cut: folded away (gain 1) in a rotated stream, amplified else."""
    if channels.basis is not None:
        return torch.full((channels.pruned_hidden_size,), 1.0 - family.gain_offset, dtype=torch.float64)
    return channels.select(gain) * channels.gain - family.gain_offset
