"""The table a person sees at the end of a run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pat.training.results import ModelFigures, TuneResult

STAGES = {"base": "base", "tuned": "tuned", "dense": "dense, written"}


def print_summary(result: TuneResult) -> None:
    """Print base, tuned and dense model side by side, the parity, and where everything is."""
    table = Table(title="Base, tuned and written model")
    table.add_column("")
    for heading in ("parameters", "size", "held-out NLL", "tokens/s"):
        table.add_column(heading, justify="right")
    for stage, name in STAGES.items():
        figures = result.figures[stage]
        table.add_row(name, f"{figures.num_parameters:,}", *_cells(figures))
    console = Console()
    console.print(table)
    base, dense = result.figures["base"], result.figures["dense"]
    console.print(f"{1 - dense.num_parameters / base.num_parameters:.1%} fewer parameters. {result.parity.describe()}")
    console.print(
        f"Model: {result.model_dir}\nAdapter: {result.adapter_dir}\nFigures: {result.output_dir / 'results.json'}"
    )


def _cells(figures: ModelFigures) -> tuple[str, str, str]:
    nll = "–" if figures.held_out_nll is None else f"{figures.held_out_nll:.3f}"
    speed = "–" if figures.tokens_per_second is None else f"{figures.tokens_per_second:,.0f}"
    return f"{figures.num_bytes / 1e6:,.1f} MB", nll, speed
