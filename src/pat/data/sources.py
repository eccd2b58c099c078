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

from datasets import (
    Dataset,
    Features,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetNotFoundError

from pat.data.conversion import PLACE, ROW, Reading, Source, TemplateChoice, convert
from pat.data.files import data_files, fingerprint_of, has_own_loading, is_saved, load_saved, say_unread
from pat.data.formats import ALPACA, Format
from pat.data.tables import ROWS_AT_ONCE, digest, labels_of
from pat.errors import PatError, reason_of
from pat.named import TASK_PREFIX, means_file
from pat.paths import near
from pat.questions import letter_answer, letter_instruction, load_rows, resolve_tasks
from pat.readers import (
    DECOMPRESSORS,
    SUFFIXES,
    Placed,
    file_fingerprint,
    iterate_local,
    row_of_table,
)
from pat.report.progress import phase

SMALL_BYTES = 8 * 2**20
"""A file of so many bytes, unless it is compressed, is converted in memory."""

SMALL_ROWS = 10_000
"""Rows of a dataset that are converted in memory."""


def load_source(name: str, reading: Reading, *, split: str = "train", config_name: str | None = None) -> Source:
    """Read and convert a local file or folder, if `name` exists or looks like one, or else a hub dataset.

    Raises:
        PatError: see `pat.data.load.load_training_data`.
    """
    path = Path(name).expanduser()
    if name.startswith(TASK_PREFIX):
        return load_task_source(name, split, reading.template)
    if os.path.isdir(path):
        return _load_folder(path, reading, split, config_name)
    if os.path.exists(path) or means_file(name):
        return _load_files(path, {"train": [path]}, reading, split)
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
    rows: list[dict[str, Any]] = []
    for task in resolve_tasks(tasks):
        for row in load_rows(task, Path(folder) if folder else None, split=split):
            prompt = ALPACA.format(instruction=letter_instruction(row))
            rows.append({"prompt": prompt, "completion": letter_answer(row)})
    known = hashlib.sha256(repr(rows).encode()).hexdigest()
    format = Format("prompt-completion", "prompt", "completion")
    numbered = [row | {PLACE: f"{name}, row {number + 1}", ROW: number} for number, row in enumerate(rows)]
    return Source(Dataset.from_list(numbered), format, "alpaca", f"sha256:{known}", len(rows), len(rows))


def _load_files(path: Path, splits: dict[str, list[Path]], reading: Reading, split: str) -> Source:
    """Read a file, or those of a folder one after the other."""
    parts: list[tuple[str, int, int | None]] = [(split, 0, None)]
    if split not in splits:
        named = [part.partition("[")[0].strip() for part in split.split("+")]
        lengths = {part: _num_rows(files) if part in named else 0 for part, files in splits.items()}
        parts = [(part, span.start, span.stop) for part, span in _spans(str(path), split, lengths)]
    files = list(dict.fromkeys(file for part, *_ in parts for file in splits[part]))
    if os.path.isdir(path):
        say_unread(path, files)
    stats = [file.stat() for file in files if os.path.isfile(file)]
    is_packed = any(file.suffix.lower() in DECOMPRESSORS for file in files)
    key = None
    if stats and (is_packed or sum(stat.st_size for stat in stats) > SMALL_BYTES):
        known = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]
        key = digest(str(path), known, split, reading.parts())
    return convert(
        str(path),
        lambda: chain.from_iterable(islice(_rows_of(splits[part]), *span) for part, *span in parts),
        reading,
        lambda: fingerprint_of(files, file_fingerprint),
        key=key,
    )


def _rows_of(files: list[Path]) -> Iterator[Placed]:
    return chain.from_iterable(map(iterate_local, files))


def _num_rows(files: list[Path]) -> int:
    return sum(1 for _ in _rows_of(files))


def _load_folder(path: Path, reading: Reading, split: str, config_name: str | None) -> Source:
    """Read what `save_to_disk` has left, what says itself how it is read, or the data files of a folder."""
    if is_saved(path):
        parts = load_saved(path)
        spans = _spans(str(path), split, {name: len(rows) for name, rows in parts.items()})
        if len({part for part, _ in spans}) > 1:
            raise PatError(f"{path}: got split {split!r}; expected one of {', '.join(map(repr, parts))}, or a slice.")
        return _convert(str(path), concatenate_datasets([parts[part].select(span) for part, span in spans]), reading)
    splits = data_files(path)
    if config_name is not None or has_own_loading(path):
        return _load_hub(str(path), reading, split, config_name)
    return _load_files(path, splits, reading, split)


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
            options = _as_text(name, config_name, split)
            return load_dataset(name, name=config_name, split=split, streaming=streaming, **options)
    except ConnectionError as error:
        raise PatError(
            f"{name}: no such file{near(name)}, and the hub could not be reached; pass an existing file ({SUFFIXES}) "
            "or go online."
        ) from error
    except DatasetNotFoundError as error:
        raise PatError(
            f"{name}: no such file{near(name)}, and the hub has no such dataset or does not show it to you; "
            "check the name, or log in for a gated dataset."
        ) from error
    except Exception as error:  # whatever its parsers, file systems and HTTP client raise
        reason = reason_of(error)
        raise PatError(f"{name}: this dataset could not be loaded, split {split!r} ({reason}).") from error


def _as_text(name: str, config_name: str | None, split: str) -> dict[str, Any]:
    """Return what has `datasets` leave the cells of CSV files as they are, unless their card says what they hold.

    It would guess types by what a column holds, `7.0` for `007` beside an empty cell, and take `NA` for nothing.
    """
    info = load_dataset_builder(name, name=config_name).info
    if info.builder_name != "csv" or info.features is not None:
        return {}
    part = re.split(r"[\[+]", split)[0].strip()
    first: dict[str, Any] = next(iter(load_dataset(name, name=config_name, split=part, streaming=True)), {})
    return {"features": Features({column: Value("string") for column in first}), "keep_default_na": False}


def _convert(name: str, dataset: Dataset, reading: Reading) -> Source:
    def placed() -> Iterator[Placed]:
        number, labels = 0, labels_of(dataset.features)
        try:
            for batch in dataset.iter(ROWS_AT_ONCE):
                columns = cast(dict[str, list[Any]], batch)
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    yield f"{name}, row {number}", row_of_table(dict(zip(columns, values, strict=True)), labels)
        except (OSError, ValueError) as error:  # pyarrow's are of these kinds
            raise PatError(f"{name}: could not be read after row {number:,} ({reason_of(error)}).") from error

    fingerprint = _hub_fingerprint(dataset)
    key = digest(name, dataset._fingerprint, reading.parts()) if len(dataset) > SMALL_ROWS else None
    return convert(name, placed, reading, lambda: fingerprint, columns=dataset.column_names, key=key)


def _spans(name: str, split: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    """Return the parts that a split names, and the indices that it selects of each.

    Raises:
        PatError: no such part, or no row.
    """
    try:
        spans = ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        parts = ", ".join(map(repr, lengths))
        slice_ = f"{next(iter(lengths), 'train')}[:99]"
        raise PatError(f"{name}: got split {split!r}; expected {parts} or a slice like {slice_!r}.") from error
    found = [(str(span.splitname), range(span.from_, span.to)) for span in spans]
    if not any(span for _, span in found):
        of_all = sum(lengths[part] for part in {part for part, _ in found})
        raise PatError(f"{name}: split {split!r} selects none of the {of_all} rows.")
    return found


def _hub_fingerprint(dataset: Dataset) -> str:
    """Return the commit of the dataset's files, which names their cache folder, or else datasets' own hash."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", folder):
            return f"revision:{folder}"
    return f"datasets:{dataset._fingerprint}"
