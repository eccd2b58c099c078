"""The table a person sees at the end of a run."""

from __future__ import annotations

from pat.report.table import Table
from pat.training.results import ModelFigures, TuneResult

STAGES = {"base": "base", "tuned": "tuned", "dense": "dense, written"}


def print_summary(result: TuneResult) -> None:
    """Print base, tuned and dense model side by side, the parity, and where everything is."""
    if result.was_finished:
        print(
            f"{result.output_dir}: this run is finished, after {result.record.num_steps:,} steps; the model is in "
            f"{result.model_dir}, and --overwrite true starts anew."
        )
        return
    tokens = f"{result.figures['dense'].num_held_out_tokens:,}"
    Table(
        title=f"Base, tuned and written model (held-out NLL: nats per token over {tokens} tokens, ± standard error)",
        columns=("", "parameters", "size", "held-out NLL", "tokens/s"),
        rows=[(name, *_cells(result.figures[stage])) for stage, name in STAGES.items()],
    ).print()
    base, dense = result.figures["base"], result.figures["dense"]
    print(f"{1 - dense.num_parameters / base.num_parameters:.1%} fewer parameters. {result.parity.describe()}")
    print(f"Model: {result.model_dir}\nAdapter: {result.adapter_dir}\nFigures: {result.output_dir / 'results.json'}")


def _cells(figures: ModelFigures) -> tuple[str, ...]:
    nll = "–" if figures.held_out_nll is None else f"{figures.held_out_nll:.3f}"
    if figures.held_out_standard_error is not None:
        nll += f" ± {figures.held_out_standard_error:.3f}"
    speed = "–" if figures.tokens_per_second is None else f"{figures.tokens_per_second:,.0f}"
    return f"{figures.num_parameters:,}", f"{figures.num_bytes / 1e6:,.1f} MB", nll, speed
