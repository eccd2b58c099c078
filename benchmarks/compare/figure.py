"""The figures of a comparison: loss and accuracy over the ratio, and loss over what training has cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from compare.config import CompareConfig
from compare.labels import End, label_ends
from compare.methods import METHODS
from compare.styles import STYLES
from compare.summary import CurvePoint, Line, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (5.2, 3.9)
"""Width and height of a panel in inches, its labels included."""


def draw_nll(lines: Sequence[Line], path: Path) -> None:
    """Draw held-out NLL over the ratio, a panel for each model, and save a PNG."""
    _draw_ratios(lines, {"held-out NLL (nats per token)": lambda line: line.nll}, 1.0, path)


def draw_accuracy(lines: Sequence[Line], path: Path) -> None:
    """Draw mean accuracy over the ratio, a panel for each model and protocol, and save a PNG."""
    protocols = list(dict.fromkeys(protocol for line in lines for protocol in line.accuracy))
    panels = {f"accuracy, {protocol} (%)": _accuracy_of(protocol) for protocol in protocols}
    _draw_ratios(lines, panels, 100.0, path)


def draw_curves(config: CompareConfig, lines: Sequence[Line], path: Path) -> None:
    """Draw validation NLL over tokens and over FLOPs at the ablations' ratio, a row for each model, and save a PNG."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    own = [line for line in lines if line.curve and line.ratio in (0.0, config.ablation_ratio)]
    models = list(dict.fromkeys(line.model for line in own))
    panels: dict[str, Callable[[CurvePoint], float]] = {
        "tokens trained on": lambda point: point.tokens,
        "training FLOPs (estimated)": lambda point: point.flops,
    }
    with _Sheet(models, list(panels), path, num_names=len({line.name for line in own})) as sheet:
        for row, model in enumerate(models):
            for column, (title, cost) in enumerate(panels.items()):
                axis = sheet.axes[row][column]
                ends = [_plot_curve(axis, line, cost) for line in own if line.model == model]
                axis.set(title=f"{model}, {config.ablation_ratio:.1%} cut", xlabel=title, xscale="log")
                axis.set_ylabel("validation NLL (nats per token)")
                axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1e7 else f"{x:.0e}"))
                axis.xaxis.set_minor_formatter(NullFormatter())
                sheet.ends[axis] = ends


def _plot_curve(axis: Axes, line: Line, cost: Callable[[CurvePoint], float]) -> End:
    style = STYLES[line.name]
    costs, means = [cost(point) for point in line.curve], [point.nll.mean for point in line.curve]
    axis.plot(costs, means, **style.of_line(line.method), markevery=max(1, len(costs) // 8))
    deviations = [point.nll.deviation or 0.0 for point in line.curve]
    if any(deviations):
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axis.fill_between(costs, low, high, color=style.color, alpha=0.12, linewidth=0)
    return End(costs[-1], means[-1], line.method.name_with_order, style.color)


def _accuracy_of(protocol: str) -> Callable[[Line], Spread | None]:
    return lambda line: line.accuracy.get(protocol)


def _draw_ratios(
    lines: Sequence[Line], panels: dict[str, Callable[[Line], Spread | None]], factor: float, path: Path
) -> None:
    models = list(dict.fromkeys(line.model for line in lines))
    names = list(dict.fromkeys(line.name for line in lines))
    pruned = [name for name in names if METHODS[name].prunes]
    ratios = sorted({100 * line.ratio for line in lines if line.ratio > 0})
    spacing = 0.5 * min([after - before for before, after in pairwise(ratios)], default=5.0)
    with _Sheet(models, list(panels), path, num_names=len(names)) as sheet:
        for row, model in enumerate(models):
            for column, (title, value) in enumerate(panels.items()):
                axis = sheet.axes[row][column]
                if ratios:
                    axis.set_xticks(ratios)
                    axis.set_xlim(ratios[0] - spacing, ratios[-1] + spacing)
                ends = []
                for name in names:
                    own = [line for line in lines if line.model == model and line.name == name]
                    place = pruned.index(name) - (len(pruned) - 1) / 2 if name in pruned else 0.0
                    ends += _plot_ratios(axis, own, spacing * place / max(1, len(pruned)), value, factor)
                axis.set_title(model)
                axis.set_ylabel(title)
                axis.set_xlabel("cut by PAT (other methods: as many parameters)")
                axis.xaxis.set_major_formatter(lambda x, _: f"{x:.3g} %")
                sheet.ends[axis] = ends


def _plot_ratios(
    axis: Axes, lines: Sequence[Line], shift: float, value: Callable[[Line], Spread | None], factor: float
) -> list[End]:
    """Draw one method: a level across if it does not prune, else points with bars, a little beside each other."""
    found = [(line, spread) for line in lines if (spread := value(line)) is not None]
    if not found:
        return []
    method, style = found[0][0].method, STYLES[found[0][0].name]
    if not method.prunes:
        spread = found[0][1]
        axis.axhline(factor * spread.mean, color=style.color, linestyle=style.level, linewidth=1.2)
        if spread.deviation:
            low, high = spread.mean - spread.deviation, spread.mean + spread.deviation
            axis.axhspan(factor * low, factor * high, color=style.color, alpha=0.12, linewidth=0)
        return [End(axis.get_xlim()[1], factor * spread.mean, method.name_with_order, style.color)]
    several_seeds = any(spread.deviation is not None for _, spread in found)
    shares = [100 * line.ratio + shift for line, _ in found]  # so that bars do not hide each other
    means = [factor * spread.mean for _, spread in found]
    deviations = [factor * (spread.deviation or 0.0) for _, spread in found] if several_seeds else None
    axis.errorbar(shares, means, yerr=deviations, capsize=3, **style.of_line(method))
    return [End(shares[-1], means[-1], method.name_with_order, style.color)]


class _Sheet:
    """A figure of rows and columns of panels, whose lines are named at their ends once all are drawn."""

    def __init__(self, rows: Sequence[str], columns: Sequence[str], path: Path, *, num_names: int) -> None:
        from matplotlib.figure import Figure

        height = max(PANEL[1], 0.9 + 0.19 * num_names)  # room for the names below each other
        size = (PANEL[0] * max(1, len(columns)) + 0.6, height * max(1, len(rows)))
        self.figure = Figure(figsize=size, dpi=150, layout="constrained")
        self.axes = self.figure.subplots(max(1, len(rows)), max(1, len(columns)), squeeze=False)
        self.path = path
        self.ends: dict[Axes, list[End]] = {}

    def __enter__(self) -> _Sheet:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is not None:
            return
        for axis in self.axes.flat:
            axis.title.set_fontsize(10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="0.92")
            axis.set_axisbelow(True)
        self.figure.draw_without_rendering()  # sets the sizes that names are placed by
        for axis, ends in self.ends.items():
            label_ends(axis, ends)
        self.figure.savefig(self.path)
