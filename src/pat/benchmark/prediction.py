"""Predictions for a setting from FLOP and byte counts, before it is measured."""

from __future__ import annotations

from typing import Literal

import torch

from pat.errors import PatError
from pat.loading import load_config, stored_dtype
from pat.surgery.costs import build_skeleton, cost_at, cost_of

Phase = Literal["prefill", "decode"]


class Predictor:
    """Counts of one model, from its configuration alone.

    Raises:
        PatError: the model cannot be used, or is quantised.
    """

    def __init__(self, name: str, *, dtype: str | None, new_tokens: int) -> None:
        config, _ = load_config(name)
        if getattr(config, "quantization_config", None) is not None:
            raise PatError(
                f"Got the model {name!r}, which is quantised; expected dense weights, which the predictions are for."
            )
        kind = stored_dtype(config) or torch.float32 if dtype is None else getattr(torch, dtype)
        self.skeleton = build_skeleton(config, kind)
        self.new_tokens = new_tokens
        self.weight_bytes = cost_of(self.skeleton, 1).total.num_bytes
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)

    def count(self, phase: Phase, batch_size: int, context: int) -> float:
        """Return the FLOPs of reading a batch, or the bytes read for one new token of each of its sequences.

        The bytes are an average over the tokens that are generated.
        """
        if phase == "prefill":
            return cost_at(self.skeleton, batch_size=batch_size, context=context).prefill_flops
        midway = context + (self.new_tokens + 1) // 2
        return cost_at(self.skeleton, batch_size=batch_size, context=midway).decode_bytes

    def memory_bytes(self, batch_size: int, context: int) -> int:
        """Return the size of the weights, and of all caches when the last token is generated."""
        end = cost_at(self.skeleton, batch_size=batch_size, context=context + self.new_tokens)
        return self.weight_bytes + end.kv_cache_bytes
