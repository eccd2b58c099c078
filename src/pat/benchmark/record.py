"""The record of a benchmark: measurements, predictions, and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pat.benchmark.measure import ROLES, Row
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.prediction import SettingPrediction
from pat.benchmark.statistics import Spread
from pat.report.records import environment


@dataclass(frozen=True)
class Benchmark:
    """Measurements of two models, and what was predicted for them."""

    options: BenchmarkOptions
    device: str
    facts: dict[str, dict[str, Any]]
    """What each process said of its model, by role."""
    predicted_weight_bytes: dict[str, int]
    rows: list[Row]
    predictions: dict[tuple[int, int], dict[str, SettingPrediction]]
    """By (batch size, context), then by role."""

    def predicted_speedup(self, row: Row) -> float:
        """Return the ratio of FLOPs for a prefill, of bytes read for generation."""
        field = "prefill_flops" if row.phase == "prefill" else "decode_bytes"
        baseline, model = (getattr(self.predictions[row.batch_size, row.context][role], field) for role in ROLES)
        return float(baseline / model)

    def tokens_per_second(self, row: Row, role: str) -> float | None:
        """Return the tokens of the whole batch that are read or generated in a second, by the median."""
        spread = row.results[role].spread
        tokens = row.batch_size * (row.context if row.phase == "prefill" else self.options.new_tokens)
        return None if spread is None else tokens / spread.median

    def predicted_memory_ratio(self, batch_size: int, context: int) -> float:
        """Return the ratio of weights and cache together when the last token is generated."""
        cache = self.predictions[batch_size, context]
        baseline, model = (self.predicted_weight_bytes[role] + cache[role].kv_cache_bytes for role in ROLES)
        return baseline / model

    def memory(self, row: Row, role: str) -> dict[str, int | None]:
        """Return how much memory a setting took, and what is predicted for weights and cache alone."""
        result, facts = row.results[role], self.facts[role]
        before, cache, peak = facts["process_bytes"], result.cache_bytes, result.peak_bytes
        prediction = self.predictions[row.batch_size, row.context][role]
        figures: dict[str, int | None] = {
            "peak_bytes": peak,
            "peak_bytes_beyond_process": None if peak is None or before is None else peak - before,
        }
        if row.phase == "decode":
            figures |= {
                "weight_and_cache_bytes": None if cache is None else facts["weight_bytes"] + cache,
                "predicted_weight_and_cache_bytes": self.predicted_weight_bytes[role] + prediction.kv_cache_bytes,
            }
        return figures


def to_dict(benchmark: Benchmark) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    options = benchmark.options
    return {
        "command": "benchmark",
        **environment(),
        "device": benchmark.device,
        "options": asdict(options),
        "models": {
            role: {
                "name": getattr(options, role),
                **benchmark.facts[role],
                "predicted_weight_bytes": benchmark.predicted_weight_bytes[role],
            }
            for role in ROLES
        },
        "settings": [_row(benchmark, row) for row in benchmark.rows],
    }


def _row(benchmark: Benchmark, row: Row) -> dict[str, Any]:
    measured, predicted = row.speedup, benchmark.predicted_speedup(row)
    return {
        "phase": row.phase,
        "batch_size": row.batch_size,
        "context": row.context,
        "speedup": _plain(measured),
        **({"cpu_speedup": _plain(row.cpu_speedup)} if benchmark.device == "cpu" else {}),
        "predicted_speedup": predicted,
        "measured_over_predicted": None if measured is None else measured.median / predicted,
        **{role: _side(benchmark, row, role) for role in ROLES},
    }


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)


def _side(benchmark: Benchmark, row: Row, role: str) -> dict[str, Any]:
    result, prediction = row.results[role], benchmark.predictions[row.batch_size, row.context][role]
    count = {"flops": prediction.prefill_flops} if row.phase == "prefill" else {"bytes": prediction.decode_bytes}
    return {
        "status": result.status,
        "detail": result.detail,
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
        "spread": _plain(result.spread),
        "tokens_per_second": benchmark.tokens_per_second(row, role),
        **{f"counted_{name}": number for name, number in count.items()},
        **benchmark.memory(row, role),
    }
