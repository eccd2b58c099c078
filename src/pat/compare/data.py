"""The rows of a comparison, the same for every method: to train on, to choose learning rates by, to report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from pat.compare.config import CompareConfig
from pat.errors import PatError
from pat.training.data import check_truncation, load_training_data
from pat.training.sources import TemplateChoice

SEED = 0
"""Of the split, so that all seeds of a comparison are judged by the same rows."""

PARTS = ("train", "validation", "held_out")


SETTINGS = ("template", "rows", "held_out", "validation", "max_length")
"""Of the comparison, that decide what is in the files."""


@dataclass(frozen=True)
class DataFiles:
    """Where a model's rows lie, as JSON lines with a prompt and a completion."""

    train: Path
    validation: Path
    held_out: Path


def data_files(folder: Path) -> DataFiles:
    """Return the files in a folder, which may not be there yet."""
    return DataFiles(*(folder / f"{part}.jsonl" for part in PARTS))


def prepare_data(config: CompareConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> DataFiles:
    """Split the data once and write the parts, unless those of the same data and settings are there.

    Raises:
        PatError: the data cannot be read, have too few rows, or none whose response fits into `max_length`.
    """
    files = data_files(folder)
    settings = {name: getattr(config, name) for name in SETTINGS} | {
        "data": config.data,
        "changed": Path(config.data).stat().st_mtime_ns if Path(config.data).is_file() else None,
        "model": tokenizer.name_or_path,
    }
    record = folder / "source.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == settings:
        return files
    record.unlink(missing_ok=True)
    apart = config.held_out + config.validation
    template = cast(TemplateChoice, config.template)  # checked there
    data = load_training_data(config.data, tokenizer=tokenizer, template=template, held_out=apart, seed=SEED)
    assert data.held_out is not None
    if "prompt" not in data.train.column_names:
        raise PatError(f"{config.data}: got texts without responses; a comparison is judged by its responses' NLL.")
    for rows in (data.train, data.held_out):
        check_truncation(tokenizer, rows, config.max_length)
    train = data.train.shuffle(seed=SEED)
    train = train.select(range(min(config.rows or len(train), len(train))))
    held_out = data.held_out.select(range(config.validation, len(data.held_out)))
    folder.mkdir(parents=True, exist_ok=True)
    _write(files.held_out, held_out)
    _write(files.validation, data.held_out.select(range(config.validation)))
    _write(files.train, train)
    record.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")  # last: with it, all are there
    return files


def _write(path: Path, rows: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt", "completion")}
