"""The questions of a task, from a local file or from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pat.errors import PatError
from pat.questions.hub import LETTERS, Row
from pat.questions.table import EvalTask

FIELDS = "stem and prompt (text), choices (a list of two texts or more) and answer (index of the right one)"


def load_rows(
    task: EvalTask, data_dir: Path | None, *, limit: int | None = None, split: str | None = None
) -> list[Row]:
    """Return the first `limit` questions of a task, or all of them.

    Args:
        data_dir: folder with a `<task>.jsonl`; without one the dataset comes from the hub.
        split: of the hub's dataset; by default the one that is asked.

    Raises:
        PatError: no such file or dataset, or rows that are not questions.
    """
    if data_dir is None:
        rows = _hub_rows(task, limit, split or task.split)
    else:
        rows = read_rows(Path(data_dir) / f"{task.name}.jsonl", limit)
    if not rows:
        raise PatError(f"The task {task.name} has no questions; expected one a line.")
    return rows


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Read questions from a JSON-lines file.

    Raises:
        PatError: no such file, or a line that is not a question; tells its number.
    """
    path = path.expanduser()
    if not path.is_file():
        raise PatError(f"{path}: no such file; expected the task's questions, one JSON object a line.")
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_checked(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise PatError(f"{path}: not readable as UTF-8 text ({error}).") from error
    return rows


def _checked(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PatError(f"{where}: not readable as JSON ({error}).") from error
    if not _is_row(row):
        raise PatError(f"{where}: is not a question; expected {FIELDS}.")
    return cast(Row, row)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("stem", "prompt")):
        return False
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        return False
    if not all(isinstance(choice, str) and choice for choice in choices):
        return False
    return isinstance(answer, int) and 0 <= answer < len(choices)


def _hub_rows(task: EvalTask, limit: int | None, split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(task.path, task.config, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # offline, no such dataset, a format datasets dropped
        reason = str(error).strip().split("\n")[0]
        raise PatError(
            f"Could not load the questions of {task.name} ({task.path}) from the hub: {reason}; pass --data_dir with a "
            f"{task.name}.jsonl."
        ) from error
    rows: list[Row] = []
    for entry in dataset:
        if limit is not None and len(rows) >= limit:
            break
        row = task.convert(cast(dict[str, Any], entry))
        if row is not None:
            rows.append(row)
    return rows
