"""A target for the size or the speed of a pruned model becomes a share of parameters to cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

from pat.budget import CutsNothing
from pat.errors import PatError
from pat.loading import stored_dtype
from pat.shape import Shape, ShapeOptions
from pat.surgery.costs import Skeleton, build_skeleton, cost_of, pruned_config

CONTEXT = 2048
"""Number of tokens that the time of reading a text is predicted for; fewer if the model reads fewer."""

BISECTIONS = 8
"""Steps of the search for a share of parameters: they leave an interval of 0.4 % of the model."""


def ratio_of_target(options: ShapeOptions, base_config: Any, choose: Callable[[float], Shape]) -> float | None:
    """Return the share of all parameters to cut for the target that options name; None if they name none.

    Args:
        options: the request, with at most one target.
        base_config: of the base model.
        choose: returns the shape that a share of parameters comes to.

    Raises:
        PatError: the target is not below what the base has, or cannot be met.
    """
    if (share := options.target_latency) is not None:
        return _ratio_of_latency(share, base_config, choose)
    if options.target_num_parameters is None and options.target_bytes is None:
        return None
    total = build_skeleton(base_config, torch.float32).model.num_parameters()
    if options.target_num_parameters is not None:
        return _below("target_num_parameters", options.target_num_parameters, total)
    itemsize = (stored_dtype(base_config) or torch.float32).itemsize
    return _below("target_bytes", parse_bytes(options.target_bytes), total * itemsize)


def parse_bytes(size: Any) -> int:
    """Return a number of bytes, which may be given as "200MB" or "1.5GB".

    Raises:
        PatError: it is no such number.
    """
    try:
        text = str(size).strip().upper()
        number = int(text) if text.isdigit() else int(convert_file_size_to_int(text.replace("IB", "iB")))
    except ValueError:
        number = 0
    if number < 1:
        raise PatError(f"Got target_bytes={size!r}; expected a size such as 200MB or 1.5GB.")
    return number


def _below(name: str, target: int, whole: int) -> float:
    if not 0 < target < whole:
        raise PatError(f"Got {name}={target:,}; expected a number below the base's {whole:,}.")
    return 1 - target / whole


def _ratio_of_latency(share: float, base_config: Any, choose: Callable[[float], Shape]) -> float:
    """Find the least share of parameters whose predicted time to read a text is no more than a share of the base's."""
    skeleton = build_skeleton(base_config, torch.float32)
    context = min(CONTEXT, getattr(base_config, "max_position_embeddings", None) or CONTEXT)
    tied = bool(base_config.tie_word_embeddings)
    goal = share * cost_of(skeleton, context).prefill_flops_per_token

    def is_met(ratio: float) -> bool:
        return _flops(skeleton, choose(ratio), context, tied=tied) <= goal

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        try:
            met = is_met(middle)
        except CutsNothing:
            met = False
        except PatError:  # more than the axes can give
            met = True
        low, high = (low, middle) if met else (middle, high)
    try:
        met = is_met(high)
    except PatError:
        met = False
    if not met:
        raise PatError(f"Got target_latency={share:g}, which these axes cannot come to; add axes, or ask for less.")
    return high


def _flops(skeleton: Skeleton, shape: Shape, context: int, *, tied: bool) -> float:
    small = build_skeleton(pruned_config(skeleton, shape, tied=tied), torch.float32)
    return cost_of(small, context).prefill_flops_per_token
