"""A local file or folder, a hub dataset or tasks as one dataset of examples in TRL's forms."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, Features, Json, List, ReadInstruction, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from pat.errors import PatError, one_line
from pat.paths import looks_local
from pat.questions import letter_answer, letter_instruction, load_rows, resolve_tasks
from pat.readers import DECOMPRESSORS, READERS, SUFFIXES, Row, data_suffix, read_local, without_nulls
from pat.training.formats import ALPACA, OPTIONS, Format, Template, convert_row, detect_format
from pat.training.messages import RowError

TemplateChoice = Literal["auto", "chat", "alpaca"]

TASK_PREFIX = "task:"
"""Begins the name of a dataset that is made of tasks' questions."""

PLACE = "place"
"""Column with where the row of an example stands; a conversation gives several examples."""

# What ends in one of these is meant as a file even where there is none: no reason to ask the hub.
FILE_SUFFIXES = {*READERS, *DECOMPRESSORS, ".txt", ".arrow", ".xlsx", ".zip", ".yaml", ".yml"}


@dataclass(frozen=True)
class Source:
    """All examples of one source in TRL's forms, with the column `PLACE`."""

    rows: Dataset
    format: Format
    template: Template | None
    fingerprint: str
    num_rows: int  # rows read, those without a response included
    unread: tuple[str, ...] = ()  # columns that have no part in the format


@dataclass(frozen=True)
class Reading:
    """Options of reading rows; `chat_template` is the source of the tokenizer's template, empty if there is none."""

    template: TemplateChoice = "auto"
    chat_template: str = ""
    text_field: str = "text"


def load_source(name: str, reading: Reading, *, split: str = "train", config_name: str | None = None) -> Source:
    """Read and convert a local file or folder, if `name` exists or looks like one, or else a hub dataset.

    Raises:
        PatError: see `pat.training.data.load_training_data`.
    """
    path = Path(name).expanduser()
    if name.startswith(TASK_PREFIX):
        return load_task_source(name, split, reading.template)
    if os.path.isdir(path):
        return _load_folder(path, reading, split, config_name)
    if os.path.exists(path) or looks_local(name) or path.suffix.lower() in FILE_SUFFIXES:
        return _load_file(path, reading, split)
    return _load_hub(name, reading, split, config_name)


def load_task_source(name: str, split: str, template: TemplateChoice = "auto") -> Source:
    """Turn the train splits of tasks into instructions under the Alpaca template, as the paper's protocol asks them.

    `task:arc_easy,piqa` names tasks of the hub, `task:FOLDER/arc_easy,piqa` those of a folder with a
    `<task>.train.jsonl` for each, and `paper` all 14 of them. On the hub, `train` and its slices are a task's own train
    split, whatever that is called.

    Raises:
        PatError: no such task, its questions cannot be loaded, a chat template, or a split of files but `train`.
    """
    if template == "chat":
        raise PatError(f"Got template='chat' with {name}; expected 'alpaca' or 'auto': tasks are asked under Alpaca's.")
    folder, _, tasks = name.removeprefix(TASK_PREFIX).rpartition("/")
    rows: list[dict[str, str]] = []
    for task in resolve_tasks(tasks):
        for row in load_rows(task, Path(folder) if folder else None, split=split):
            prompt = ALPACA.format(instruction=letter_instruction(row))
            rows.append({"prompt": prompt, "completion": letter_answer(row)})
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    format = Format("prompt-completion", "prompt", "completion")
    places = [f"{name}, row {number}" for number in range(1, len(rows) + 1)]
    return Source(Dataset.from_list(rows).add_column(PLACE, places), format, "alpaca", f"sha256:{digest}", len(rows))


def _load_file(path: Path, reading: Reading, split: str) -> Source:
    rows, fingerprint = read_local(path)
    [indices] = _selected(str(path), split, {"train": len(rows)}).values()
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    converter = _Converter(str(path), columns, rows[indices[0]][1], reading)
    examples = [example for index in indices for example in converter.convert(*rows[index])]
    return converter.source(examples, fingerprint, len(indices))


def _load_folder(path: Path, reading: Reading, split: str, config_name: str | None) -> Source:
    """Read what `save_to_disk` has left, the one data file of a folder, or several as one dataset."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        stored = load_from_disk(str(path))
        parts = dict(stored) if isinstance(stored, DatasetDict) else {"train": stored}
        [(part, indices)] = _selected(str(path), split, {str(name): len(rows) for name, rows in parts.items()}).items()
        return _convert(str(path), parts[part].select(indices), reading)
    files = [file for file in sorted(path.iterdir()) if file.is_file() and data_suffix(file) in READERS]
    if not files:
        raise PatError(f"{path}: is a folder without a data file; expected one in it ({SUFFIXES}).")
    return (
        _load_file(files[0], reading, split) if len(files) == 1 else _load_hub(str(path), reading, split, config_name)
    )


def _load_hub(name: str, reading: Reading, split: str, config_name: str | None) -> Source:
    try:
        dataset = load_dataset(name, name=config_name, split=split)
    except ConnectionError as error:
        raise PatError(
            f"{name}: no such file, and the hub could not be reached; pass an existing file ({SUFFIXES}) or go online."
        ) from error
    except DatasetNotFoundError as error:
        raise PatError(
            f"{name}: no such file, and the hub has no such dataset or does not show it to you; "
            "check the name, or log in for a gated dataset."
        ) from error
    except Exception as error:  # whatever its parsers, file systems and HTTP client raise
        reason = one_line(error)
        raise PatError(f"{name}: this dataset could not be loaded, split {split!r} ({reason}).") from error
    if not len(dataset):
        raise PatError(f"{name}: split {split!r} has no rows; expected at least one example.")
    return _convert(name, dataset, reading)


def _convert(name: str, dataset: Dataset, reading: Reading) -> Source:
    converter = _Converter(name, dataset.column_names, without_nulls(dataset[0]), reading)

    # Mapped rather than read into a list: stays on disk, and the next run finds it in the cache.
    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = (without_nulls(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True))
        places = (f"{name}, row {index + 1}" for index in indices)
        pairs = zip(places, rows, strict=True)
        examples = [example for place, row in pairs for example in converter.convert(place, row)]
        return {key: [example[key] for example in examples] for key in converter.features}

    rows = dataset.map(
        convert, batched=True, with_indices=True, remove_columns=dataset.column_names, features=converter.features
    )
    return converter.source(rows, _hub_fingerprint(dataset), len(dataset))


class _Converter:
    """Converts the rows of one source, whose columns and first row say how."""

    def __init__(self, name: str, columns: Sequence[str], first: Row, reading: Reading) -> None:
        self.name, self.reading = name, reading
        self.format = format = detect_format(columns, name, reading.text_field)
        self.unread = tuple(column for column in columns if column not in format.columns)
        as_it_is = format.name == "prompt-completion" and not isinstance(first.get(format.prompt), list)
        self.template: Template | None = "chat" if reading.chat_template else "alpaca"
        if reading.template != "auto":
            self.template = reading.template
        elif as_it_is or format.name == "text":
            self.template = None
        chat = self.template == "chat"
        kind = List(Json()) if chat else Value("string")
        options = [name for name in OPTIONS if chat and name in format.beside]
        names = ["text"] if format.name == "text" else ["prompt", "completion"]
        kinds: dict[str, Any] = dict.fromkeys(names, kind) | dict.fromkeys(options, Json()) | {PLACE: Value("string")}
        self.features = Features(kinds)

    def convert(self, place: str, row: Row) -> list[dict[str, Any]]:
        """Return the examples of a row as their columns hold them."""
        try:
            examples = convert_row(row, self.format, self.template, self.reading.chat_template)
        except RowError as error:
            raise PatError(f"{place}: {error}") from error
        if self.template == "chat":  # in JSON, each message keeps the fields that it has, and no others
            examples = [
                {
                    key: [json.dumps(item) for item in value] if key in ("prompt", "completion") else json.dumps(value)
                    for key, value in example.items()
                }
                for example in examples
            ]
        return [{**dict.fromkeys(self.features), **example, PLACE: place} for example in examples]

    def source(self, rows: Dataset | list[dict[str, Any]], fingerprint: str, num_rows: int) -> Source:
        """Return the source of these examples, unless there are none."""
        if not len(rows):
            raise PatError(f"{self.name}: all {num_rows} responses are empty; expected at least one with text.")
        if isinstance(rows, list):
            rows = Dataset.from_list(rows, self.features)
        return Source(rows, self.format, self.template, fingerprint, num_rows, self.unread)


def _selected(name: str, split: str, lengths: dict[str, int]) -> dict[str, Sequence[int]]:
    """Return the part that a split names, and the indices that it selects.

    Raises:
        PatError: no such part, a sum of parts, or no row.
    """
    try:
        spans = ReadInstruction.from_spec(split).to_absolute(lengths)
        [part] = {span.splitname for span in spans}
    except ValueError as error:
        parts = ", ".join(map(repr, lengths))
        raise PatError(f"{name}: got split {split!r}; expected {parts} or a slice like 'train[:99]'.") from error
    indices = [index for span in spans for index in range(span.from_, span.to)]
    if not indices:
        raise PatError(f"{name}: split {split!r} selects none of the {lengths[part]} rows.")
    return {part: indices}


def _hub_fingerprint(dataset: Dataset) -> str:
    """Return the commit of the dataset's files, which names their cache folder, or else datasets' own hash."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", folder):
            return f"revision:{folder}"
    return f"datasets:{dataset._fingerprint}"
