"""The figures of a comparison: held-out loss and accuracy over the ratio, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pat.compare.methods import METHODS
from pat.compare.summary import Line, Spread

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
"""Okabe and Ito's, which colour-blind people can tell apart."""

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
    figure = Figure(figsize=(1.2 + 4.6 * len(panels), 0.9 + 3.9 * len(models) + 0.22 * len(names)), dpi=150)
    axes = figure.subplots(len(models), len(panels), squeeze=False)
    for row, model in enumerate(models):
        for column, (title, value) in enumerate(panels.items()):
            axis = axes[row][column]
            for index, name in enumerate(names):
                own = [line for line in lines if line.model == model and line.name == name]
                _plot(axis, own, index, len(names), value, factor)
            axis.set_title(model, fontsize=10)
            axis.set_ylabel(title)
            axis.set_xlabel("hidden size cut (other methods: as many parameters)")
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.3g} %")
            ratios = sorted({100 * line.ratio for line in lines if line.ratio > 0})
            if ratios:
                axis.set_xticks(ratios)
                axis.set_xlim(ratios[0] - 3, ratios[-1] + 3)
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
    axis: Axes, lines: Sequence[Line], index: int, num_names: int, value: Callable[[Line], Spread | None], factor: float
) -> None:
    """Draw one method: a level across if it does not prune, else points with bars, a little beside each other."""
    found = [(line, spread) for line in lines if (spread := value(line)) is not None]
    if not found:
        return
    method = METHODS[found[0][0].name]
    order = f" ({method.order})" if method.order in ("FT→P", "P→FT") else ""
    color, label = _COLORS[index % len(_COLORS)], method.label + order
    if not method.prunes:
        style = ("--", ":", "-.")[index % 3]
        spread = found[0][1]
        axis.axhline(factor * spread.mean, color=color, linestyle=style, linewidth=1.2, label=label)
        if spread.deviation:
            low, high = spread.mean - spread.deviation, spread.mean + spread.deviation
            axis.axhspan(factor * low, factor * high, color=color, alpha=0.12, linewidth=0)
        return
    shift = 2 * (index - (num_names - 1) / 2) / num_names  # percent, so that bars do not hide each other
    axis.errorbar(
        [100 * line.ratio + shift for line, _ in found],
        [factor * spread.mean for _, spread in found],
        yerr=[factor * (spread.deviation or 0.0) for _, spread in found],
        color=color,
        marker=_MARKERS[(index + index // len(_MARKERS)) % len(_MARKERS)],
        linestyle="--" if method.order == "FT→P" else "-",
        linewidth=1.4,
        markersize=5,
        capsize=3,
        label=label,
    )
