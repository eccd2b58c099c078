"""The figure of a benchmark: measured and predicted speed-up at each setting."""

from __future__ import annotations

from pathlib import Path

from pat.benchmark.command import BenchmarkRecord
from pat.benchmark.measure import PHASES
from pat.benchmark.prediction import Phase

_TITLES: dict[Phase, str] = {"prefill": "Prefill", "decode": "Decode"}
_COUNTED: dict[Phase, str] = {"prefill": "FLOPs", "decode": "bytes read"}
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito's: told apart by colour-blind people, and in grey by the order in which they stand."""

_SLOT = 0.8
"""Share of the space of one batch size that its contexts fill."""


def draw(record: BenchmarkRecord, path: Path) -> None:
    """Draw measured speed-ups as points with quartiles, predicted ones as lines across them, and save a PNG.

    Batch sizes stand side by side, within each its contexts. A setting without a figure says so.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    phases = [phase for phase in PHASES if any(row.phase == phase for row in record.settings)]
    options = record.options
    contexts, sizes = options.contexts, options.batch_sizes
    figure = Figure(figsize=(1.4 + 1.25 * len(phases) * max(2, 0.33 * len(sizes) * len(contexts) + 1), 4.2), dpi=150)
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    step = _SLOT / len(contexts)
    for axis, phase in zip(axes, phases, strict=True):
        for row in record.settings:
            if row.phase != phase:
                continue
            rank = contexts.index(row.context)
            color = _COLORS[rank % len(_COLORS)]
            x = sizes.index(row.batch_size) + (rank - (len(contexts) - 1) / 2) * step
            predicted, measured = row.predicted_speedup, row.speedup
            axis.hlines(predicted, x - 0.42 * step, x + 0.42 * step, color=color, linewidth=2.2, alpha=0.55)
            if measured is None:
                reasons = sorted({side.status for side in (row.baseline, row.model)} - {"ok"})
                words, place = ", ".join(reasons).replace("_", " "), axis.get_xaxis_transform()  # at the panel's foot
                axis.text(x, 0.03, words, transform=place, rotation=90, ha="center", fontsize=7, color=color)
                continue
            bars = [[measured.median - measured.lower_quartile], [measured.upper_quartile - measured.median]]
            axis.errorbar(x, measured.median, yerr=bars, fmt="o", color=color, markersize=5, capsize=3)
        axis.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_title(f"{_TITLES[phase]} (predicted from {_COUNTED[phase]})", fontsize=10)
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set_xlim(-0.5, len(sizes) - 0.5)
        for edge in range(1, len(sizes)):
            axis.axvline(edge - 0.5, color="0.9", linewidth=0.8)
        axis.set_xlabel("batch size (sequences)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("speed-up over the baseline")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, 0.95), max(high, 1.05))
    axes[0].yaxis.set_major_formatter("{x:g}×")
    handles = [
        Line2D([], [], color=_COLORS[rank % len(_COLORS)], marker="s", linestyle="", label=f"context {context} tokens")
        for rank, context in enumerate(contexts)
    ]
    handles += [
        Line2D([], [], color="0.3", marker="o", linestyle="", label="measured: median, quartiles"),
        Line2D([], [], color="0.3", linewidth=2.2, alpha=0.55, label="predicted"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=8, frameon=False)
    where = f"{record.device}, {record.models['model'].dtype}"
    figure.suptitle(f"{options.model} against the baseline\n{options.baseline} ({where})", fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(path)
