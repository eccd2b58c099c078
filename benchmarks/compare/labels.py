"""Names at the ends of lines, in place of a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT_SIZE = 7.5

LINE_HEIGHT = 1.35
"""Distance of names below each other, as a multiple of their size."""

_LEADER = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}


@dataclass(frozen=True)
class End:
    """Where a line ends, in the axes' data, and what it is called."""

    x: float
    y: float
    name: str
    color: str


def label_ends(axis: Axes, ends: Sequence[End]) -> None:
    """Write names to the right of a panel, at the height of their lines or as near as they fit, with a thin leader."""
    height = axis.get_window_extent().height * 72 / axis.figure.dpi  # in points
    gap = LINE_HEIGHT * FONT_SIZE / height
    to_axes = axis.transData + axis.transAxes.inverted()
    placed = sorted(((to_axes.transform((end.x, end.y)), end) for end in ends), key=lambda pair: float(pair[0][1]))
    heights = spread_out([float(place[1]) for place, _ in placed], gap)
    for (place, end), y in zip(placed, heights, strict=True):
        axis.annotate(
            end.name,
            xy=(float(place[0]), float(place[1])),
            xytext=(1.06, y),
            xycoords="axes fraction",
            textcoords="axes fraction",
            annotation_clip=False,
            color=end.color,
            fontsize=FONT_SIZE,
            va="center",
            arrowprops=_LEADER | {"color": end.color},
        )


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights at least a gap apart, moved as little as the sum of squares allows.

    Args:
        heights: ascending.
        gap: least distance.
    """
    # Less `index * gap` each, they only have to ascend: pool neighbours that do not (isotonic regression).
    pools: list[list[float]] = []
    for index, height in enumerate(heights):
        pools.append([height - index * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    flat = [_mean(pool) for pool in pools for _ in pool]
    return [height + index * gap for index, height in enumerate(flat)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
