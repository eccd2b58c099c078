"""A local file or a hub dataset as one dataset of converted rows."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError

from pat.errors import PatError
from pat.questions import letter_answer, letter_instruction, load_rows, resolve_tasks
from pat.training.formats import ALPACA, Format, RowError, Template, convert_row, detect_format
from pat.training.readers import READERS, read_local

TemplateChoice = Literal["auto", "chat", "alpaca"]

TASK_PREFIX = "task:"
"""Begins the name of a dataset that is made of tasks' questions."""

# What ends in one of these is meant as a file even where there is none: no reason to ask the hub.
FILE_SUFFIXES = {*READERS, ".txt", ".tsv", ".arrow", ".xlsx", ".gz", ".zip", ".zst", ".yaml", ".yml"}

_STRING = Value("string")
_MESSAGES = [{"role": _STRING, "content": _STRING}]


@dataclass(frozen=True)
class Source:
    """All usable rows of one source in TRL's forms; conversations are still whole."""

    rows: Dataset
    format: Format
    template: Template | None
    fingerprint: str
    num_rows: int  # rows read, those without a response included


def load_source(
    name: str, *, split: str, config_name: str | None, template: TemplateChoice, has_chat_template: bool
) -> Source:
    """Read and convert a local file, if `name` exists or looks like one, or else a hub dataset.

    Raises:
        PatError: see `pat.training.data.load_training_data`.
    """

    def plan(columns: list[str], first_row: Mapping[str, Any]) -> tuple[Format, Template | None]:
        format = detect_format(columns, name)
        return format, _resolve_template(template, format, first_row, has_chat_template)

    if name.startswith(TASK_PREFIX):
        return load_task_source(name, split, template)
    if Path(name).expanduser().exists() or _looks_like_file(name):
        return _load_local(Path(name).expanduser(), split, plan)
    return _load_hub(name, split, config_name, plan)


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
    return Source(Dataset.from_list(rows), format, "alpaca", f"sha256:{digest}", len(rows))


_Plan = Callable[[list[str], Mapping[str, Any]], tuple[Format, Template | None]]


def _load_local(path: Path, split: str, plan: _Plan) -> Source:
    local = read_local(path)
    try:
        spans = ReadInstruction.from_spec(split).to_absolute({"train": len(local.rows)})
    except ValueError as error:
        raise PatError(f"{path}: got split {split!r}; a file has 'train' and slices like 'train[:99]'.") from error
    indices = [index for span in spans for index in range(span.from_, span.to)]
    if not indices:
        raise PatError(f"{path}: split {split!r} selects none of the file's {len(local.rows)} rows.")
    format, template = plan(local.columns(), local.rows[indices[0]])
    converted = (_convert(local.rows[index], format, template, local.place, index) for index in indices)
    kept = [row for row in converted if row is not None]
    if not kept:
        raise _all_empty(str(path), len(indices))
    rows = Dataset.from_list(kept, features=_features(format, template))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source(rows, format, template, f"sha256:{digest}", len(indices))


def _load_hub(name: str, split: str, config_name: str | None, plan: _Plan) -> Source:
    try:
        dataset = load_dataset(name, name=config_name, split=split)
    except ConnectionError as error:
        raise PatError(
            f"{name}: no such file, and the hub could not be reached; "
            f"pass an existing file ({', '.join(READERS)}) or go online."
        ) from error
    except DatasetNotFoundError as error:
        raise PatError(
            f"{name}: no such file, and the hub has no such dataset or does not show it to you; "
            "check the name, or log in for a gated dataset."
        ) from error
    except Exception as error:  # whatever its parsers, file systems and HTTP client raise
        reason = " ".join(str(error).split())
        raise PatError(f"{name}: this hub dataset could not be loaded, split {split!r} ({reason}).") from error
    if not len(dataset):
        raise PatError(f"{name}: split {split!r} has no rows; expected at least one example.")
    format, template = plan(dataset.column_names, dataset[0])
    features = _features(format, template)

    # Mapped rather than read into a list: stays on disk, and the next run finds it in the cache.
    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        originals = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        rows = [
            _convert(row, format, template, lambda index: f"{name}, row {index + 1}", index)
            for index, row in zip(indices, originals, strict=True)
        ]
        return {key: [row[key] for row in rows if row is not None] for key in features}

    rows = dataset.map(convert, batched=True, with_indices=True, remove_columns=dataset.column_names, features=features)
    if not len(rows):
        raise _all_empty(name, len(dataset))
    return Source(rows, format, template, _hub_fingerprint(dataset), len(dataset))


def _all_empty(name: str, num_rows: int) -> PatError:
    return PatError(f"{name}: all {num_rows} responses are empty; expected at least one with text.")


def _convert(
    row: Mapping[str, Any],
    format: Format,
    template: Template | None,
    place: Callable[[int], str],
    index: int,
) -> dict[str, Any] | None:
    try:
        return convert_row(row, format, template)
    except RowError as error:
        raise PatError(f"{place(index)}: {error}") from error


def _resolve_template(
    choice: TemplateChoice, format: Format, first_row: Mapping[str, Any], has_chat_template: bool
) -> Template | None:
    if format.name == "text":
        return None
    if choice != "auto":
        return choice
    if format.name == "prompt-completion" and not isinstance(first_row.get(format.prompt), list):
        return None
    return "chat" if has_chat_template else "alpaca"


def _features(format: Format, template: Template | None) -> Features:
    if format.name == "text":
        return Features({"text": _STRING})
    if template != "chat":
        return Features({"prompt": _STRING, "completion": _STRING})
    if format.name == "messages":
        return Features({"messages": _MESSAGES})
    return Features({"prompt": _MESSAGES, "completion": _MESSAGES})


def _looks_like_file(name: str) -> bool:
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # a hub id is at most `owner/name`
        return True
    return Path(name).suffix.lower() in FILE_SUFFIXES


def _hub_fingerprint(dataset: Dataset) -> str:
    """The commit of the dataset's files, which names their cache folder, or else datasets' own hash."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", folder):
            return f"revision:{folder}"
    return f"datasets:{dataset._fingerprint}"
