"""What FLOP and byte counts say about a setting, before it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from pat.benchmark.checks import resolve_dtype
from pat.benchmark.options import BenchmarkOptions
from pat.loading import load_config, stored_dtype
from pat.plan.costs import Skeleton, build_skeleton, cost_at, cost_of


@dataclass(frozen=True)
class SettingPrediction:
    """Counts of one model at one batch size and context."""

    prefill_flops: float
    decode_bytes: float
    """Read for one token of each sequence, on average over the tokens that are generated."""
    kv_cache_bytes: int
    """Of all sequences, when the last token is generated."""


class Predictor:
    """Counts of one model, from its configuration alone."""

    def __init__(self, name: str, options: BenchmarkOptions) -> None:
        config, family = load_config(name)
        dtype = resolve_dtype(options.dtype or str(stored_dtype(config) or "float32"))
        self.skeleton: Skeleton = build_skeleton(config, family, dtype)
        self.new_tokens = options.new_tokens
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return cost_of(self.skeleton, 1).total.num_parameters

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return cost_of(self.skeleton, 1).total.num_bytes

    def at(self, batch_size: int, context: int) -> SettingPrediction:
        """Count what a setting takes."""
        midway = cost_at(self.skeleton, batch_size=batch_size, context=context + (self.new_tokens + 1) // 2)
        end = cost_at(self.skeleton, batch_size=batch_size, context=context + self.new_tokens)
        start = cost_at(self.skeleton, batch_size=batch_size, context=context)
        return SettingPrediction(start.prefill_flops, midway.decode_bytes, end.kv_cache_bytes)
