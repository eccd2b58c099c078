"""A record that was read from a file and may lack anything: an older version's, or one that somebody has edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Values of a record by their keys, each None, or empty, where there is none of that kind."""

    record: Mapping[str, Any]

    def __call__(self, *keys: str) -> Any:
        """Return what stands there, of whatever kind."""
        value: Any = self.record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def number(self, *keys: str) -> float | None:
        """Return a number that can be reckoned with."""
        return as_number(self(*keys))

    def text(self, *keys: str) -> str | None:
        """Return a text that is not empty."""
        value = self(*keys)
        return value if isinstance(value, str) and value else None

    def mapping(self, *keys: str) -> Mapping[str, Any]:
        """Return a mapping."""
        value = self(*keys)
        return value if isinstance(value, Mapping) else {}

    def items(self, *keys: str) -> list[Any]:
        """Return the items of a list."""
        value = self(*keys)
        return value if isinstance(value, list) else []

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return steps and values of what was logged under a name."""
        rows = [row for row in self.items("log_history") if isinstance(row, Mapping)]
        pairs = [(as_number(row.get("step")), as_number(row.get(key))) for row in rows]
        return sorted(
            ((x, y) for x, y in pairs if x is not None and y is not None and x >= 0), key=lambda point: point[0]
        )


def as_number(value: Any) -> float | None:
    """Return a value if it is a number of a size that can be divided and drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e18 else None
