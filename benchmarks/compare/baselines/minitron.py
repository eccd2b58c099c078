"""Minitron's width pruning of MLPs (Muralidharan et al., 2024, "Compact Language Models via Pruning and Knowledge
Distillation"): channels by their activations, the weights sliced, nothing refitted and no masks.

The importance of a channel is what the paper found best: of what goes into the down projection the mean absolute value
over the tokens of a sequence, then the L2 norm over the sequences. Every layer keeps the same number of channels. The
knowledge distillation that follows in the paper is the comparison's training (`pat.training.distillation.distill`).

Where we differ from the paper: MLPs alone are cut, as PAT's default cuts them, so that shapes are equal and the
criterion and the training are what is compared; the paper chooses among shapes of heads, MLPs and hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pat.errors import PatError
from pat.nll import evaluating
from pat.shape import AXES
from pat.surgery.axes import InnerCut, cut_inner, prunable
from pat.surgery.dense import build_dense
from pat.surgery.describe import map_of
from pat.surgery.residual import ResidualBranch, model_tensors

from .calibration import batched

BATCH_SIZE = 4
"""Sequences of one forward pass."""


def minitron(
    model: PreTrainedModel, calibration: Sequence[Tensor], *, target_parameters: int
) -> tuple[PreTrainedModel, int]:
    """Return a new model of the same class with narrower MLPs, and their number of channels.

    Args:
        model: a dense base model without adapters; it stays as it is.
        calibration: token sequences, each `(T,)`.
        target_parameters: size of the result, which is the largest that is not above it.

    Raises:
        PatError: the family's MLPs cannot be cut, not by as much, or there is no calibration text.
    """
    channels = num_channels(model, target_parameters)
    scores = channel_scores(model, calibration)
    keep = {path: _largest(score, channels) for path, score in scores.items()}
    return slice_channels(model, keep), channels


def num_channels(model: PreTrainedModel, target_parameters: int) -> int:
    """Return the number of MLP channels of every layer with which a model comes closest to a size from below.

    Raises:
        PatError: the family's MLPs cannot be cut, or not by as much.
    """
    branches = mlp_branches(model)
    size = getattr(model.config, "intermediate_size", 0)
    if not branches or not all(branch.inner for branch in branches) or _has_experts(model):
        raise PatError(
            f"Got a model of type {model.config.model_type!r}, whose MLPs Minitron's criterion cannot cut; leave the "
            "method out, or use another base."
        )
    base = prunable(model)
    none, whole = (base.count(base.sizes | {AXES["mlp"].field: channels}) for channels in (0, size))
    channels = min(size, (target_parameters - none) * size // (whole - none))
    if channels < 1:
        raise PatError(
            f"Got a target of {target_parameters:,} parameters, but without any MLP {none:,} are left; cut less, or "
            "leave Minitron out."
        )
    return int(channels)


@torch.no_grad()
def channel_scores(model: PreTrainedModel, calibration: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the importance of every MLP channel, `(intermediate_size,)` in float64, by the path of its writer."""
    squares: dict[str, Tensor] = {}

    def add(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean = inputs[0].detach().double().abs().mean(1)  # (B, size), over the tokens
        squares[path] = squares.get(path, 0) + mean.square().sum(0)

    paths = [branch.writer.path for branch in mlp_branches(model)]
    handles = [model.get_submodule(path).register_forward_pre_hook(partial(add, path)) for path in paths]
    try:
        with evaluating(model):
            for batch in batched(calibration, BATCH_SIZE):
                model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return {path: squares[path].sqrt() for path in paths}


def slice_channels(model: PreTrainedModel, keep: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a new model with the given channels alone: masks `(size,)` by the writer's path, equally many each."""
    config = copy.deepcopy(model.config)
    (config.intermediate_size,) = {int(mask.sum()) for mask in keep.values()}
    config.use_cache = True
    tensors = model_tensors(model)
    small = cut_inner(
        lambda name: tensors[name].detach(), map_of(model), {path: InnerCut(mask) for path, mask in keep.items()}
    )
    weights = {name: cast(Tensor, small(name)).clone() for name in tensors}
    with torch.random.fork_rng():
        pruned = build_dense(model, config, weights, model.dtype)
    cast(nn.Module, pruned).to(model.device)
    return pruned


def mlp_branches(model: PreTrainedModel) -> list[ResidualBranch]:
    """Return the MLPs of a model, in the order of its layers."""
    return [branch for branch in map_of(model).branches if branch.kind == "mlp"]


def _has_experts(model: PreTrainedModel) -> bool:
    return any(model.get_parameter(branch.writer.weight).ndim != 2 for branch in mlp_branches(model))


def _largest(score: Tensor, count: int) -> Tensor:
    """Return a mask of the largest entries; ties go to the lower index."""
    order = score.sort(descending=True, stable=True).indices[:count]
    return torch.zeros(len(score), dtype=torch.bool, device=score.device).index_fill_(0, order, True)
