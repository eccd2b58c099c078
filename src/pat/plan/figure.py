"""The figure of a plan with measured shapes: what cutting each axis costs, and the shapes under the budget."""

from __future__ import annotations

from pathlib import Path

from pat.plan.curves import Measured, Point
from pat.report.figure import MARK
from pat.shape import AXES

_COLORS = {"hidden": "#3b4cc0", "mlp": "#000000", "heads": "#009e73", "layers": "#d55e00"}
_MARKERS = {"hidden": "o", "mlp": "s", "heads": "^", "layers": "D"}


def draw(measured: Measured, title: str, path: Path) -> None:
    """Draw loss over share of parameters, a line for each axis and a cross for each pair, and save a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=150)
    axis = figure.subplots()
    for name, points in measured.curves.items():
        axis.plot(
            [0, *(100 * point.pruning_ratio for point in points)],
            [measured.base_nll, *(point.nll for point in points)],
            color=_COLORS[name],
            marker=_MARKERS[name],
            markersize=5,
            label=AXES[name].label,
        )
    pairs = [point for point in measured.candidates if len(point.sizes) > 1]
    for number, point in enumerate(pairs, start=1):
        axis.plot(
            100 * point.pruning_ratio,
            point.nll,
            color="#cc79a7",
            marker=f"${number}$",
            markersize=8,
            linestyle="",
            label=f"{number}: {_sizes(point)}",
        )
    axis.axhline(measured.base_nll, color="0.5", linewidth=0.8, linestyle=":")
    axis.annotate(
        "base",
        (1, measured.base_nll),
        (0, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        color="0.4",
        ha="right",
        va="top",
    )
    axis.set_xlim(left=0)
    axis.set_xlabel("parameters cut")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.3g} %")
    axis.set_ylabel("NLL before any training (nats per token)")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata=MARK)


def _sizes(point: Point) -> str:
    labels = {axis.option: axis.label for axis in AXES.values()}
    return ", ".join(f"{labels[option]} {size:,}" for option, size in point.sizes.items())
