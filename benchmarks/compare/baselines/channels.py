"""Hidden channels removed outright, by weight magnitude or at random: what PAT's trained mask has to beat.

Both cut the same axis to the same width as PAT, with PAT's own exact cut (no operators, no rotation), so the result is
an ordinary dense model of exactly PAT's size, equal to the base with the removed channels set to zero everywhere.

The magnitude of a channel follows group-norm pruning (Li et al., 2017, "Pruning Filters for Efficient ConvNets", with
the coupled parameters of Fang et al., 2023, "DepGraph"): all rows that write a channel and all columns that read it go
together, so they are scored together. We differ in taking the product of the two norms rather than the norm over both:

    score(c) = sqrt(sum over writers |W[c, :]|^2) * sqrt(sum over readers |R[:, c]|^2)

with norm gains folded into their readers (and post-norm gains into their writers), so that the score does not depend on
how a model shares out a channel's scale between the two sides.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pat.surgery.dense import build_dense
from pat.surgery.describe import map_of
from pat.surgery.fold import Channels, HeadPlan, fold_weights
from pat.surgery.precision import to_float64
from pat.surgery.residual import ResidualStream, model_tensors
from pat.tuner.weights import embedding_ratio

from .budget import pat_config


def keep_random(hidden_size: int, pruned_hidden_size: int, *, seed: int) -> Tensor:
    """Return d' of d channels drawn without replacement, ascending, `(d',)`."""
    order = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed))
    return order[:pruned_hidden_size].sort().values


def keep_largest(scores: Tensor, pruned_hidden_size: int) -> Tensor:
    """Return the d' channels of the highest scores, ascending, `(d',)`; ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:pruned_hidden_size].sort().values


@torch.no_grad()
def magnitude_scores(model: PreTrainedModel) -> Tensor:
    """Return the score of every hidden channel, `(d,)`, float64; see the module for its definition.

    Raises:
        PatError: unsupported family.
    """
    stream = map_of(model)

    def weight(name: str) -> Tensor:
        return to_float64(model.get_parameter(name).detach())

    def gain(norm: str | None) -> Tensor | float:
        return 1.0 if norm is None else weight(f"{norm}.weight") + stream.family.gain_offset

    embedding = weight(f"{stream.embedding}.weight")
    written = _energy(embedding)
    head = embedding if stream.head is None else weight(stream.head.weight)
    read = _energy(head * gain(stream.final_norm))
    for branch in stream.branches:
        # A writer is (d, in), or experts (num_experts, d, in): with the last two axes swapped, channels come last.
        written += _energy(weight(branch.writer.weight).mT * gain(branch.post_norm))
        for reader in branch.readers:
            read += _energy(weight(reader.weight) * gain(branch.pre_norm))
    return (written * read).sqrt()


def cut_channels(model: PreTrainedModel, keep: Tensor) -> PreTrainedModel:
    """Return a new dense model with only the given hidden channels, `(d',)`; the model passed in stays as it is.

    Raises:
        PatError: unsupported family, or transformers refuses that width.
    """
    stream: ResidualStream = map_of(model)
    family, tensors = stream.family, model_tensors(model)
    config = pat_config(model, len(keep))
    ratio = 1.0
    if family.scaled_embedding:
        ratio = embedding_ratio(model.get_submodule(family.embedding), len(keep), model.dtype)
    folded = fold_weights(
        stream,
        lambda name: tensors[name].detach(),
        Channels(getattr(model.config, family.hidden_size_field), keep),
        {},
        HeadPlan(tied=stream.head is None, embedding_ratio=ratio),
        dtype=model.dtype,
    )
    with torch.no_grad(), torch.random.fork_rng():
        dense = build_dense(model, config, dict(folded), model.dtype)
    cast(nn.Module, dense).to(model.device)
    return dense


def _energy(matrix: Tensor) -> Tensor:
    """Return the sum of squares of each column, over all leading axes, `(d,)`."""
    return matrix.square().flatten(0, -2).sum(0)
