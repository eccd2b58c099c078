"""Record of what cutting each axis costs, and of the shapes that come out best under a budget."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A shape, and what it costs before training."""

    sizes: dict[str, int]
    """Sizes of the axes that are cut, by the name of the option that asks for them."""
    pruning_ratio: float
    """Share of all parameters that is cut."""
    nll: float
    """Mean loss of a response token, in nats."""
    predicted_nll: float | None = None
    """The same from the curves of the single axes; None for a single axis."""
    tuned_nll: float | None = None
    """Loss of the dense model after the steps of a search, on the rows that `pat tune` holds out; None without one."""

    def options(self) -> str:
        """Return the flags of `pat tune` that ask for this shape."""
        return " ".join(f"--{name} {size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class Measured:
    """Curves and candidates of a model on a dataset."""

    dataset: str
    num_calibration_tokens: int
    num_scored_tokens: int
    base_nll: float
    curves: dict[str, tuple[Point, ...]]
    """Points of each axis that can be cut, by the share of parameters, ascending."""
    candidates: tuple[Point, ...]
    """Shapes that meet the budget, best first: after the steps of the search, or before training without one."""
    num_steps: int = 0
    """Optimizer steps that each candidate was tuned for."""
