"""Describes what can be cut of a base model: its sizes, its number of parameters, and axes that cannot be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pat.shape import AXES

HIDDEN, MLP, HEADS, LAYERS = (AXES[name].field for name in ("hidden", "mlp", "heads", "layers"))

Sizes = Mapping[str, int]
"""Sizes by the field of a configuration."""


@dataclass(frozen=True)
class Prunable:
    """A base model as the choice of a shape sees it: its sizes, and what limits their cut."""

    sizes: dict[str, int]
    """Sizes of the base model, see `Shape`."""
    count: Callable[[Sizes], int]
    """Returns the exact number of parameters at some sizes."""
    queries_per_group: int = 1
    """Number of query heads for each key/value head."""
    mlp_step: int = 1
    """The number of MLP channels that stay has to be a multiple of this, as the kernels for experts ask."""
    fewest_layers: int = 1
    """Number of layers that have to stay: one, or those of the rarer kinds (see `pat.surgery.layers`)."""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    """Reasons why axes cannot be cut, by axis."""

    def num_attention_heads(self, sizes: Sizes) -> int:
        """Return the number of query heads at some sizes."""
        return self.queries_per_group * sizes[HEADS]
