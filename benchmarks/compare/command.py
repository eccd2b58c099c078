"""Run a comparison, or go on with it, and write its table and figures."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compare.cells import done_cells, is_asked_for, num_missing
from compare.config import CompareConfig
from compare.results import read_rows
from compare.summary import Line, summarise
from pat.errors import PatError, RunFailed
from pat.options import OptionsParser

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one comparison and return its exit status: 0 done, 1 cells failed, 2 the input is wrong."""
    try:
        parser = OptionsParser("python -m compare", CompareConfig, "Methods, ratios and seeds under one budget.")
        comparison = run_compare(parser.parse(sys.argv[1:] if argv is None else argv))
    except PatError as error:
        print(f"compare: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("compare: interrupted", file=sys.stderr)
        return 130
    print(comparison.table)
    print("Wrote " + ", ".join(str(path) for path in comparison.files))
    return 0


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    config: CompareConfig
    lines: list[Line]
    table: str
    """Markdown."""
    files: list[Path]


def run_compare(config: CompareConfig) -> Comparison:
    """Run what is not done yet of a comparison, and write `results.md`, `nll.png`, `accuracy.png` and `curves.png`.

    Raises:
        PatError: a model, the data or a baseline cannot be used.
        RunFailed: cells failed; what is done stays, with its table.
    """
    if config.redraw:
        return write_comparison(config)
    from compare.runner import run_cells  # seconds, which what is wrong with the flags need not take

    try:
        rows = run_cells(config)
    except RunFailed:
        write_comparison(config)
        raise
    except KeyboardInterrupt:
        if rows := read_rows(config):
            write_comparison(config, rows)
            logger.warning("What is done is in %s; the same command goes on from there.", config.output_dir)
        raise
    return write_comparison(config, rows)


def write_comparison(config: CompareConfig, rows: list[dict[str, Any]] | None = None) -> Comparison:
    """Write table and figures of what is done."""
    from compare.figure import draw_accuracy, draw_curves, draw_nll
    from compare.tables import markdown

    rows = read_rows(config) if rows is None else rows
    lines, done = summarise(config, rows), done_cells(rows)
    others = sum(not is_asked_for(config, cell) for cell in done)
    if others:
        logger.warning(
            "Cells in %s that the table does not show: %d, of other models, methods, ratios or seeds; ask for those as "
            "well to see them.",
            config.output_dir,
            others,
        )
    table = markdown(config, lines, num_missing(config, done))
    files = [config.output_dir / "results.md"]
    files[0].write_text(table, encoding="utf-8")
    if not lines:
        return Comparison(config, lines, table, files)
    if find_spec("matplotlib") is None:
        logger.warning("No figure was drawn, because matplotlib is not installed: pip install 'pat-llm[figures]'.")
        return Comparison(config, lines, table, files)
    files.append(config.output_dir / "nll.png")
    draw_nll(lines, files[-1])
    if any(line.accuracy for line in lines):
        files.append(config.output_dir / "accuracy.png")
        draw_accuracy(lines, files[-1])
    if any(line.curve for line in lines):
        files.append(config.output_dir / "curves.png")
        draw_curves(config, lines, files[-1])
    return Comparison(config, lines, table, files)
