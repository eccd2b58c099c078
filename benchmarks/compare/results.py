"""`results.jsonl`: one line for each cell that is done, in the order in which they were finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from compare.cells import Cell
from compare.config import CompareConfig
from pat.errors import PatError

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
