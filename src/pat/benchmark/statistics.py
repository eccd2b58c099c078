"""What several measurements come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements: half of them lie between the quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float


def spread_of(values: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated between measurements.

    Args:
        values: at least one.
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def paired_ratios(baseline: Sequence[float], model: Sequence[float]) -> Spread:
    """Return the spread of the speed-up: seconds of the baseline over those of the model, pair by pair.

    Measurements that were taken next to each other are divided, so that a machine that slows down between two pairs
    does not count as a difference between the models.
    """
    return spread_of([b / m for b, m in zip(baseline, model, strict=True)])
