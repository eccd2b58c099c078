"""Whether a shape meets the target for its size or speed that a plan was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pat.loading import stored_dtype
from pat.shape import TARGETS, Shape, ShapeOptions, parse_bytes
from pat.surgery.costs import build_skeleton, cost_of, pruned_config, usual_context


def named_target(options: ShapeOptions) -> dict[str, Any]:
    """Return the target that options name, by the name of its option; empty without one."""
    return {name: value for name in TARGETS if (value := getattr(options, name)) is not None}


def check_of_target(target: Mapping[str, Any], base_config: Any) -> Callable[[Shape], bool]:
    """Return what tells whether a shape has no more than a target allows; without one every shape does.

    Args:
        target: of `named_target`: parameters, bytes in the dtype of the base's checkpoint, or a share of the FLOPs that
            the base takes to read a text.
        base_config: of the base model.
    """
    if not target:
        return lambda _: True
    (name, most), *_ = target.items()
    skeleton = build_skeleton(base_config, stored_dtype(base_config) or torch.float32)
    context, tied = usual_context(base_config), bool(base_config.tie_word_embeddings)
    base_flops = cost_of(skeleton, context).prefill_flops_per_token

    def is_met(shape: Shape) -> bool:
        small = build_skeleton(pruned_config(skeleton, shape, tied=tied), skeleton.dtype)
        cost = cost_of(small, context)
        if name == "target_num_parameters":
            return bool(cost.total.num_parameters <= most)
        if name == "target_bytes":
            return cost.total.num_bytes <= parse_bytes(most)
        return bool(cost.prefill_flops_per_token <= most * base_flops)

    return is_met
