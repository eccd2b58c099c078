"""Run a comparison, or go on with it, and write its table and figures."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pat.command_parser import CommandParser

from compare.cells import done_cells, is_asked_for, num_missing
from compare.config import CompareConfig, make_config
from compare.figure import draw_accuracy, draw_nll
from compare.flags import add_flags, with_config_path
from compare.results import read_rows
from compare.runner import run_cells
from compare.summary import Line, summarise
from compare.tables import markdown
from pat.errors import PatError, RunFailed

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Methods, ratios and seeds under one budget -> the paper's table, at home."""
    parser = CommandParser("compare", main)
    parser.prog = "python -m compare"
    add_flags(parser)
    try:
        comparison = run_compare(vars(parser.parse(with_config_path(sys.argv[1:] if argv is None else argv))))
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


def run_compare(options: Mapping[str, Any]) -> Comparison:
    """Run what is not done yet of a comparison, and write `results.md`, `nll.png` and `accuracy.png`.

    Raises:
        PatError: a setting, a model, the data or the baselines cannot be used.
        RunFailed: cells failed; what is done stays, with its table.
    """
    config = make_config(options)
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
    return Comparison(config, lines, table, files)
