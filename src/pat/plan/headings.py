"""Names of the columns in the tables of a plan."""

from __future__ import annotations

from pat.plan.command import PlanRecord
from pat.shape import AXES, Shape


def headings(record: PlanRecord) -> list[str]:
    """Return the heading of the base's column, and those of the candidates."""
    return [
        "base",
        *(f"{sizes_of(candidate.shape)} ({candidate.pruning_ratio:.1%} cut)" for candidate in record.candidates),
    ]


def sizes_of(shape: Shape) -> str:
    """Return what a shape keeps of each axis that it cuts."""
    words = {"hidden": "{}", "mlp": "MLP {}", "heads": "{} KV heads", "layers": "{} layers"}
    return ", ".join(words[name].format(shape.pruned(name)) for name in AXES if shape.cuts(name))
