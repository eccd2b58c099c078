"""The figures of a comparison: held-out loss and accuracy over the ratio, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from compare.methods import METHODS
from compare.summary import Line, Spread

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
"""Okabe and Ito's, which colour-blind people can tell apart; their black is PAT's."""

_MARKERS = "osD^vPX*"


def draw_nll(lines: Sequence[Line], path: Path) -> None:
    """Draw held-out NLL over the ratio, a panel for each model, and save a PNG."""
    _draw(lines, {"held-out NLL (nats per token)": lambda line: line.nll}, 1.0, path)


def draw_accuracy(lines: Sequence[Line], path: Path) -> None:
    """Draw mean accuracy over the ratio, a panel for each model and protocol, and save a PNG."""
    protocols = list(dict.fromkeys(protocol for line in lines for protocol in line.accuracy))
    panels = {f"accuracy, {protocol} (%)": _accuracy_of(protocol) for protocol in protocols}
    _draw(lines, panels, 100.0, path)


def _accuracy_of(protocol: str) -> Callable[[Line], Spread | None]:
    return lambda line: line.accuracy.get(protocol)


def _draw(lines: Sequence[Line], panels: dict[str, Callable[[Line], Spread | None]], factor: float, path: Path) -> None:
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(line.model for line in lines))
    names = list(dict.fromkeys(line.name for line in lines))
    ratios = sorted({100 * line.ratio for line in lines if line.ratio > 0})
    spacing = 0.5 * min([after - before for before, after in pairwise(ratios)], default=5.0)
    figure = Figure(figsize=(1.2 + 4.6 * len(panels), 0.9 + 3.9 * len(models) + 0.22 * len(names)), dpi=150)
    axes = figure.subplots(len(models), len(panels), squeeze=False)
    for row, model in enumerate(models):
        for column, (title, value) in enumerate(panels.items()):
            axis = axes[row][column]
            for index, name in enumerate(names):
                own = [line for line in lines if line.model == model and line.name == name]
                _plot(axis, own, index, len(names), spacing, value, factor)
            axis.set_title(model, fontsize=10)
            axis.set_ylabel(title)
            axis.set_xlabel("hidden size cut (other methods: as many parameters)")
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.3g} %")
            if ratios:
                axis.set_xticks(ratios)
                axis.set_xlim(ratios[0] - spacing, ratios[-1] + spacing)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="0.92")
            axis.set_axisbelow(True)
    entries: dict[str, Artist] = {}
    for axis in axes.flat:  # a method may be there for one model only
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    names_of, columns = list(entries), 2 * len(panels)
    figure.legend(
        list(entries.values()), names_of, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path)


def _plot(
    axis: Axes,
    lines: Sequence[Line],
    index: int,
    num_names: int,
    spacing: float,
    value: Callable[[Line], Spread | None],
    factor: float,
) -> None:
    """Draw one method: a level across if it does not prune, else points with bars, a little beside each other."""
    found = [(line, spread) for line in lines if (spread := value(line)) is not None]
    if not found:
        return
    method = METHODS[found[0][0].name]
    order = f" ({method.order})" if method.order in ("FT→P", "P→FT") else ""
    is_pat = found[0][0].name == "pat"  # what the comparison is about is to be found at once
    color, label = "#000000" if is_pat else _COLORS[index % len(_COLORS)], method.label + order
    if not method.prunes:
        style = ("--", ":", "-.")[index % 3]
        spread = found[0][1]
        axis.axhline(factor * spread.mean, color=color, linestyle=style, linewidth=1.2, label=label)
        if spread.deviation:
            low, high = spread.mean - spread.deviation, spread.mean + spread.deviation
            axis.axhspan(factor * low, factor * high, color=color, alpha=0.12, linewidth=0)
        return
    shift = spacing * (index - (num_names - 1) / 2) / num_names  # percent, so that bars do not hide each other
    several_seeds = any(spread.deviation is not None for _, spread in found)
    axis.errorbar(
        [100 * line.ratio + shift for line, _ in found],
        [factor * spread.mean for _, spread in found],
        yerr=[factor * (spread.deviation or 0.0) for _, spread in found] if several_seeds else None,
        color=color,
        marker=_MARKERS[(index + 3 * (index // len(_COLORS))) % len(_MARKERS)],
        linestyle="--" if method.order == "FT→P" else "-",
        linewidth=2.4 if is_pat else 1.2,
        markersize=7 if is_pat else 5,
        zorder=4 if is_pat else 3,
        capsize=3,
        label=label,
    )
