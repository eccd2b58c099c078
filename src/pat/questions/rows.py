"""The questions of a task, from a local file or from the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from pat.errors import PatError
from pat.questions.hub import LETTERS, Row
from pat.questions.table import EvalTask

FIELDS = "stem and prompt (text), choices (a list of two texts or more) and answer (index of the right one)"


def load_rows(
    task: EvalTask, data_dir: Path | None, *, limit: int | None = None, split: str | None = None
) -> list[Row]:
    """Return the questions of a task, or `limit` of them, evenly spaced: files are often sorted by subject.

    Args:
        data_dir: folder with a `<task>.jsonl`, and a `<task>.train.jsonl` to train on; without one the dataset comes
            from the hub.
        split: by default the one that is asked; `train` is the task's train split, slices of it are for the hub only.

    Raises:
        PatError: no such file, dataset or split, or rows that are not questions.
    """
    if data_dir is None:
        rows = _hub_rows(task, task.split if split is None else _split_on_hub(task, split))
    else:
        rows = read_rows(Path(data_dir) / _file_name(task, split))
    if not rows:
        raise PatError(f"The task {task.name} has no questions; expected one a line.")
    return evenly_spaced(rows, limit)


def evenly_spaced(rows: list[Row], limit: int | None) -> list[Row]:
    """Return `limit` rows, evenly spaced and in their order, or all where there are no more."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[number * len(rows) // limit] for number in range(limit)]


def read_rows(path: Path) -> list[Row]:
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
                if line.strip():
                    rows.append(_parsed(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise PatError(f"{path}: not readable as UTF-8 text ({error}).") from error
    return rows


def _file_name(task: EvalTask, split: str | None) -> str:
    if split is None:
        return f"{task.name}.jsonl"
    if split != "train":
        raise PatError(f"Got split {split!r} of files of questions; expected 'train', which is <task>.train.jsonl.")
    return f"{task.name}.train.jsonl"


def _split_on_hub(task: EvalTask, split: str) -> str:
    """Return a split, or a sum of slices, with `train` as the task's dataset calls it."""
    return "+".join(re.sub(r"^\s*train(?=\s*(\[|$))", task.train_split, part) for part in split.split("+"))


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PatError(f"{where}: not readable as JSON ({error}).") from error
    return _checked(row, where)


def _checked(row: Any, where: str) -> Row:
    """Return a question without fields that are not ours."""
    if not _is_row(row):
        raise PatError(f"{where}: is not a question; expected {FIELDS}.")
    return cast(Row, {name: row[name] for name in Row.__annotations__ if name in row})


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("stem", "prompt")):
        return False
    if not isinstance(row.get("subject", ""), str):
        return False
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        return False
    if not all(isinstance(choice, str) and choice for choice in choices):
        return False
    return type(answer) is int and 0 <= answer < len(choices)  # a bool is an int, too


def _hub_rows(task: EvalTask, split: str) -> list[Row]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(task.path, task.config, split=split)
    except Exception as error:  # whatever its parsers, file systems and HTTP client raise
        reason = str(error).strip().split("\n")[0]
        raise PatError(
            f"Could not load the questions of {task.name} ({task.path}, split {split!r}) from the hub: {reason}; "
            f"pass {'--data_dir' if split == task.split else 'task:FOLDER/' + task.name} with the file "
            f"{_file_name(task, None if split == task.split else 'train')}, or go online."
        ) from error
    rows: list[Row] = []
    for number, entry in enumerate(dataset, start=1):
        where = f"{task.path}, split {split!r}, row {number}"
        try:
            row = task.convert(cast(dict[str, Any], entry))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise PatError(f"{where}: is not a question of {task.name} ({type(error).__name__}: {error}).") from error
        if row is not None:
            rows.append(_checked(row, where))
    return rows
