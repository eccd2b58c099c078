"""What there is to be cut of a base model, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pat.shape import AXES

HIDDEN, MLP, HEADS, LAYERS = (AXES[name].field for name in ("hidden", "mlp", "heads", "layers"))

Sizes = Mapping[str, int]
"""Sizes by the field of a configuration."""


@dataclass(frozen=True)
class Prunable:
    """The sizes that a base model has to be cut, and what stands in the way."""

    sizes: dict[str, int]
    """Its sizes, see `Shape`."""
    count: Callable[[Sizes], int]
    """Returns the exact number of parameters at some sizes."""
    queries_per_group: int = 1
    """Number of query heads for each key/value head."""
    mlp_step: int = 1
    """Number of which the MLP channels that are left are a multiple: what the kernels for experts want."""
    fewest_layers: int = 1
    """Number of layers that have to stay: one, or those of the rarer kinds (see `pat.surgery.layers`)."""
    obstacles: Mapping[str, str] = field(default_factory=dict)
    """Reasons why axes cannot be cut, by axis."""

    def num_attention_heads(self, sizes: Sizes) -> int:
        """Return the number of query heads at some sizes."""
        return self.queries_per_group * sizes[HEADS]
