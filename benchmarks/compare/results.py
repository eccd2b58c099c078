"""`results.jsonl`: one line for each cell that is done, in the order in which they were finished."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from compare.cells import Cell
from compare.config import CompareConfig
from compare.methods import decisive, outdated
from pat.errors import PatError

logger = logging.getLogger(__name__)

FILE = "results.jsonl"


def read_rows(config: CompareConfig) -> list[dict[str, Any]]:
    """Return the rows of earlier runs; cells that failed are left out, and so run again.

    Raises:
        PatError: the file is another comparison's.
    """
    path = config.output_dir / FILE
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short when the run was killed
            continue
        if not _is_row(row):
            raise PatError(f"{path}: holds a line that is no cell's: {line[:60]!r}; choose another --output_dir.")
        if "failed" not in row:
            rows.append(row)
    identity = json.loads(json.dumps(config.identity()))
    for row in rows:
        theirs = row["identity"]
        differing = sorted(name for name in identity if theirs.get(name) != identity[name])
        if differing:
            name = differing[0]
            raise PatError(
                f"{path}: holds a comparison with {name}={theirs.get(name)}, got {identity[name]}; choose another "
                "--output_dir."
            )
    return rows


def read_current_rows(config: CompareConfig) -> list[dict[str, Any]]:
    """Return the rows of methods as they are now; the others are named, and their cells have to be run again.

    Raises:
        PatError: see `read_rows`.
    """
    current, old = [], Counter[str]()
    for row in read_rows(config):
        if (reason := outdated(row)) is None:
            current.append(row)
        else:
            old[f"{row['cell']['method']}, {reason}"] += 1
    if old:
        cells = "; ".join(f"{count} of {what}" for what, count in sorted(old.items()))
        logger.warning(
            "Cells in %s that were run with other defaults or versions of their methods, and are run again: %s.",
            config.output_dir,
            cells,
        )
    return current


def row_identity(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    """Return what decides the figures of one cell: the comparison's settings and its method."""
    return config.identity() | {"method": decisive(cell.method)}


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), dict) for key in ("cell", "identity", "inputs")):
        return False
    return set(row["cell"]) == {field.name for field in fields(Cell)}


def append_row(config: CompareConfig, row: Mapping[str, Any]) -> None:
    """Add a row; a line that an earlier run left without its end gets one first."""
    path = config.output_dir / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
