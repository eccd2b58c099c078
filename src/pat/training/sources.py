"""A local file or folder, a hub dataset or tasks as one dataset of examples in TRL's forms."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from pat.errors import PatError, one_line
from pat.paths import looks_local
from pat.questions import letter_answer, letter_instruction, load_rows, resolve_tasks
from pat.readers import (
    DECOMPRESSORS,
    READERS,
    SUFFIXES,
    Placed,
    data_suffix,
    file_fingerprint,
    iterate_local,
    without_nulls,
)
from pat.report.progress import phase
from pat.training.conversion import PLACE, ROW, Reading, Source, TemplateChoice, convert
from pat.training.formats import ALPACA, Format
from pat.training.tables import ROWS_AT_ONCE, digest

TASK_PREFIX = "task:"
"""Begins the name of a dataset that is made of tasks' questions."""

SMALL_BYTES = 8 * 2**20
"""A file of so many bytes, unless it is compressed, is converted in memory."""

SMALL_ROWS = 10_000
"""Rows of a dataset that are converted in memory."""

# What ends in one of these is meant as a file even where there is none: no reason to ask the hub.
FILE_SUFFIXES = {*READERS, *DECOMPRESSORS, ".txt", ".arrow", ".xlsx", ".zip", ".yaml", ".yml"}


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


def check_exists(name: str) -> None:
    """Check that a local file or folder is there, before others are read.

    Raises:
        PatError: it is not.
    """
    path = Path(name).expanduser()
    is_meant = looks_local(name) or path.suffix.lower() in FILE_SUFFIXES
    if is_meant and not name.startswith(TASK_PREFIX) and not os.path.exists(path):
        next(iterate_local(path))  # says so


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
    rows: list[dict[str, Any]] = []
    for task in resolve_tasks(tasks):
        for row in load_rows(task, Path(folder) if folder else None, split=split):
            prompt = ALPACA.format(instruction=letter_instruction(row))
            rows.append({"prompt": prompt, "completion": letter_answer(row)})
    known = hashlib.sha256(repr(rows).encode()).hexdigest()
    format = Format("prompt-completion", "prompt", "completion")
    numbered = [row | {PLACE: f"{name}, row {number + 1}", ROW: number} for number, row in enumerate(rows)]
    return Source(Dataset.from_list(numbered), format, "alpaca", f"sha256:{known}", len(rows), len(rows))


def _load_file(path: Path, reading: Reading, split: str) -> Source:
    spans: list[tuple[int, int | None]] = [(0, None)]
    if split != "train":
        num_rows = sum(1 for _ in iterate_local(path))
        [parts] = _selected(str(path), split, {"train": num_rows}).values()
        spans = [(part.start, part.stop) for part in parts]
    stat = path.stat() if os.path.isfile(path) else None
    is_large = stat is not None and (stat.st_size > SMALL_BYTES or path.suffix.lower() in DECOMPRESSORS)
    key = (
        digest(str(path.resolve()), str(path), stat.st_size, stat.st_mtime_ns, split, reading.parts())
        if stat and is_large
        else None
    )
    return convert(
        str(path),
        lambda: chain.from_iterable(islice(iterate_local(path), *span) for span in spans),
        reading,
        lambda: file_fingerprint(path),
        key=key,
    )


def _load_folder(path: Path, reading: Reading, split: str, config_name: str | None) -> Source:
    """Read what `save_to_disk` has left, the one data file of a folder, or several as one dataset."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        stored = load_from_disk(str(path))
        parts = dict(stored) if isinstance(stored, DatasetDict) else {"train": stored}
        [(part, spans)] = _selected(str(path), split, {str(name): len(rows) for name, rows in parts.items()}).items()
        return _convert(str(path), concatenate_datasets([parts[part].select(span) for span in spans]), reading)
    files = [file for file in sorted(path.iterdir()) if file.is_file() and data_suffix(file) in READERS]
    if not files:
        raise PatError(f"{path}: is a folder without a data file; expected one in it ({SUFFIXES}).")
    return (
        _load_file(files[0], reading, split) if len(files) == 1 else _load_hub(str(path), reading, split, config_name)
    )


def _load_hub(name: str, reading: Reading, split: str, config_name: str | None) -> Source:
    dataset = load_from_hub(name, reading, split, config_name)
    if not len(dataset):
        raise PatError(f"{name}: split {split!r} has no rows; expected at least one example.")
    return _convert(name, dataset, reading)


def load_from_hub(name: str, reading: Reading, split: str, config_name: str | None, *, streaming: bool = False) -> Any:
    """Load what `datasets` loads, or have it streamed.

    Raises:
        PatError: there is no such thing, or it cannot be loaded.
    """
    try:
        # On a terminal `datasets` draws bars of its own.
        with phase(f"Loading {name}", shown=reading.shown and not sys.stderr.isatty()):
            return load_dataset(name, name=config_name, split=split, streaming=streaming)
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


def _convert(name: str, dataset: Dataset, reading: Reading) -> Source:
    def placed() -> Iterator[Placed]:
        number = 0
        for batch in dataset.iter(ROWS_AT_ONCE):
            columns = cast(dict[str, list[Any]], batch)
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield f"{name}, row {number}", without_nulls(dict(zip(columns, values, strict=True)))

    fingerprint = _hub_fingerprint(dataset)
    key = digest(name, dataset._fingerprint, reading.parts()) if len(dataset) > SMALL_ROWS else None
    return convert(name, placed, reading, lambda: fingerprint, columns=dataset.column_names, key=key)


def _selected(name: str, split: str, lengths: dict[str, int]) -> dict[str, list[range]]:
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
    indices = [range(span.from_, span.to) for span in spans]
    if not any(indices):
        raise PatError(f"{name}: split {split!r} selects none of the {lengths[part]} rows.")
    return {part: indices}


def _hub_fingerprint(dataset: Dataset) -> str:
    """Return the commit of the dataset's files, which names their cache folder, or else datasets' own hash."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", folder):
            return f"revision:{folder}"
    return f"datasets:{dataset._fingerprint}"
