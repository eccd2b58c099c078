"""`pat compare`: run a comparison, or go on with it, and write its table and figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pat.compare.cells import done_cells, is_asked_for, num_missing
from pat.compare.config import CompareConfig, make_config
from pat.compare.figure import draw_accuracy, draw_nll
from pat.compare.results import read_rows
from pat.compare.runner import run_cells
from pat.compare.summary import Line, summarise
from pat.compare.tables import markdown
from pat.errors import RunFailed

logger = logging.getLogger(__name__)


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
