"""A target for the size or the speed of a pruned model becomes a share of parameters to cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pat.budget import CutsNothing
from pat.errors import PatError
from pat.loading import stored_dtype
from pat.prunable import Prunable
from pat.shape import TARGETS, Shape, ShapeOptions, parse_bytes
from pat.surgery.costs import build_skeleton, cost_of, pruned_config, usual_context

BISECTIONS = 10
"""Steps of the search for a share of parameters: they leave an interval of 0.1 % of the model."""


def ratio_of_target(
    options: ShapeOptions, base_config: Any, base: Prunable, choose: Callable[[float], Shape]
) -> float | None:
    """Return the least share of all parameters with which the target is met that options name; None without one.

    A target is what the pruned model has at most.

    Args:
        options: the request, with at most one target.
        base_config: of the base model.
        base: what there is to be cut.
        choose: returns the shape that a share of parameters comes to.

    Raises:
        PatError: the target is not below what the base has, cannot be met, or stands beside an untied head, which
            adds to the model what the target does not know of.
    """
    name = next((name for name in TARGETS if getattr(options, name) is not None), None)
    if name is None:
        return None
    target = getattr(options, name)
    if options.untie_word_embeddings and base_config.tie_word_embeddings:
        raise PatError(f"Got {name}={target} with untie_word_embeddings, which adds a matrix; give a ratio instead.")
    if name == "target_latency":
        is_met = _is_fast_enough(target, base_config)
    else:
        itemsize = 1 if name == "target_num_parameters" else (stored_dtype(base_config) or torch.float32).itemsize
        number, whole = target if itemsize == 1 else parse_bytes(target), base.count(base.sizes) * itemsize
        if not 0 < number < whole:
            raise PatError(f"Got {name}={number:,}; expected a number below the base's {whole:,}.")

        def is_met(shape: Shape) -> bool:
            return base.count(shape.pruned_sizes) * itemsize <= number

    return _least_ratio(f"{name}={target}", choose, is_met)


def _least_ratio(asked: str, choose: Callable[[float], Shape], is_met: Callable[[Shape], bool]) -> float:
    """Find the least share of parameters whose shape meets a target."""
    low, high, found = 0.0, 1.0, False
    obstacle: PatError | None = None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        try:
            met = is_met(choose(middle))
            found = found or met
        except CutsNothing:
            met = False
        except PatError as error:  # more than the axes can give, or nothing that they can give at all
            met, obstacle = True, error
        low, high = (low, middle) if met else (middle, high)
    if found:
        try:
            if is_met(choose(high)):
                return high
        except PatError as error:
            obstacle = error
    try:
        furthest = f"; the furthest that they go is {choose(low).describe()}"
    except PatError:  # not even the least ratio has a shape
        furthest = "" if obstacle is None else f" ({obstacle})"
    raise PatError(f"Got {asked}, which these axes cannot come to{furthest}. Add axes, or give a larger target.")


def _is_fast_enough(share: float, base_config: Any) -> Callable[[Shape], bool]:
    skeleton = build_skeleton(base_config, torch.float32)
    context = usual_context(base_config)
    tied = bool(base_config.tie_word_embeddings)
    goal = share * cost_of(skeleton, context).prefill_flops_per_token

    def is_met(shape: Shape) -> bool:
        small = build_skeleton(pruned_config(skeleton, shape, tied=tied), torch.float32)
        return cost_of(small, context).prefill_flops_per_token <= goal

    return is_met
