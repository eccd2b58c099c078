"""Choose the layers that are cut: measure what the base model loses without each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pat import ranks
from pat.errors import Diverged
from pat.method.gate import Gate
from pat.nll import LOGIT_ROWS, evaluating
from pat.report.progress import phase
from pat.surgery.layers import layers_of
from pat.surgery.residual import ResidualStream
from pat.surgery.rotation import importance_order
from pat.tuner.calibration import NOT_FINITE, token_batches
from pat.tuner.shared import share_from_first_process, sum_over_processes, total_over_processes

LAYER_TOKENS = 4096
"""Number of tokens on which the loss without each layer is measured, in one forward pass for each layer."""


def branch_ends(model: nn.Module, stream: ResidualStream) -> list[list[nn.Module]]:
    """Return, for each layer, the modules whose outputs are added to the residual stream."""
    return [[model.get_submodule(branch.end) for branch in branches] for branches in layers_of(stream)]


def order_layers(model: nn.Module, stream: ResidualStream, gate: Gate, batches: Iterable[Mapping[str, Any]]) -> None:
    """Give the gate over the layers its prior: the more the loss grows without a layer, the longer it stays.

    Args:
        model: the base model, its adapters disabled.
        stream: roles of its parameters.
        gate: over the layers.
        batches: see `token_batches`; read until there are `LAYER_TOKENS` tokens.

    Raises:
        PatError: the batches hold no token.
        Diverged: the whole model's loss is not finite.
    """
    losses = losses_without(model, stream, batches, LAYER_TOKENS)
    # A layer that the model cannot do without at all may leave something that is no number.
    score = losses.nan_to_num(nan=torch.inf).masked_fill(gate.pinned.cpu(), torch.inf)
    prior = importance_order(score, gate.num_kept).prior.to(gate.prior)
    share_from_first_process(prior)
    gate.set_prior(prior)


@torch.no_grad()
def losses_without(
    model: nn.Module, stream: ResidualStream, batches: Iterable[Mapping[str, Any]], max_tokens: int
) -> Tensor:
    """Return the mean loss of the next token without each layer, `(layers,)` in float64.

    Args:
        model: the base model, its adapters disabled.
        stream: roles of its parameters.
        batches: see `token_batches`.
        max_tokens: number of tokens after which no further batch is read.
    """
    ends = branch_ends(model, stream)
    total, num_scored, num_read = torch.zeros(len(ends), dtype=torch.float64), 0, 0
    own = max_tokens // ranks.num_processes()
    with evaluating(model), phase("Measuring the layers", "tokens", total=own) as progress:
        progress.is_most = True  # the text may be shorter
        for inputs, real in token_batches(model, batches, max_tokens):
            scored = real[:, 1:] & real[:, :-1]
            if "position_ids" in inputs:  # rows that are packed begin at 0
                scored = scored & (inputs["position_ids"].expand_as(real)[:, 1:] > 0)
            if not ranks.connected() and not scored.any():
                continue
            num_scored, num_real = num_scored + int(scored.sum()), int(real.sum())
            for number, modules in enumerate(ends):
                with _silenced(modules):
                    loss = _loss(model, inputs, scored)
                total[number] += loss
                progress.done = num_read + num_real * (number + 1) // len(ends)
            num_read += num_real
    # On the model's device, where the processes can sum.
    device = next(model.parameters()).device
    sums = total.to(device)
    sum_over_processes(sums)
    total, num_scored = sums.cpu(), total_over_processes(num_scored, model)
    if num_scored == 0 or not total.isfinite().any():
        raise Diverged(NOT_FINITE)
    return total / num_scored


def _loss(model: nn.Module, inputs: Mapping[str, Tensor], scored: Tensor) -> float:
    """Return the summed loss of the tokens that follow a scored position."""
    logits = model(**inputs, use_cache=False).logits[:, :-1][scored]
    targets = inputs["input_ids"][:, 1:][scored].to(logits.device)
    parts = zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return sum(cross_entropy(rows.float(), ids, reduction="sum").item() for rows, ids in parts)


@contextmanager
def _silenced(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have modules put out zeros."""
    handles = [module.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
