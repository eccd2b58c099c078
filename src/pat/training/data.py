"""From what a user points at to datasets that TRL's SFTTrainer accepts."""

import hashlib
import os
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, Features, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError

from pat.errors import PatError
from pat.evaluation.perplexity import tokenize_row
from pat.training.formats import Format, RowError, Template, convert_row, detect_format, split_turns
from pat.training.readers import READERS, read_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_HELD_OUT_ROWS = 200
DEFAULT_HELD_OUT_SHARE = 0.02

# What ends in one of these is meant as a file even where there is none; no hub id looks like it.
FILE_SUFFIXES = {*READERS, ".txt", ".tsv", ".arrow", ".xlsx", ".gz", ".zip", ".zst", ".yaml", ".yml"}

_STRING = Value("string")
_MESSAGES = [{"role": _STRING, "content": _STRING}]

HeldOut = int | float | str | os.PathLike[str] | None


@dataclass(frozen=True)
class TrainingData:
    """Data ready for SFTTrainer, and where it came from.

    `train` and `held_out` have the columns `prompt` and `completion` (strings or message lists), or `text`. A
    conversation with several answers gives several rows of them, so these may hold more rows than `num_rows`.
    """

    train: Dataset
    held_out: Dataset | None
    format: str  # "alpaca", "prompt-completion", "messages" or "text"
    template: Template | None  # None: strings are used as they are
    source: str  # path or hub id as given
    fingerprint: str  # "sha256:…" of a local file, "revision:…" or "datasets:…" of a hub dataset
    num_rows: int  # rows read, without those of a separate held-out file
    num_dropped: int  # of them without a response, hence in neither dataset


@dataclass(frozen=True)
class _Source:
    """Converted rows before conversations are taken apart."""

    rows: Dataset
    format: Format
    template: Template | None
    fingerprint: str
    num_rows: int


def load_training_data(
    name_or_path: str | os.PathLike[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    split: str = "train",
    config_name: str | None = None,
    template: Literal["auto", "chat", "alpaca"] = "auto",
    held_out: HeldOut = None,
    seed: int = 0,
) -> TrainingData:
    """Load, check and convert instruction data, and keep some of it apart.

    Args:
        name_or_path: a local `.json`, `.jsonl`, `.parquet` or `.csv` file, or a hub dataset id.
        tokenizer: asked only whether it has a chat template.
        split: the split of a hub dataset, slices such as `train[:1000]` included; a local file is one split, `train`.
        config_name: the configuration of a hub dataset.
        template: how instructions become prompts; "auto": chat if the tokenizer has a chat template, else alpaca, and
            prompt and completion strings as they are.
        held_out: rows to keep apart: a number, a share below 1, 0 for none, or a separate local file; by default 2 %,
            at most 200. Numbers may come as strings.
        seed: decides which rows are kept apart.

    Raises:
        PatError: nothing there, unreadable, malformed or of unknown format, all responses empty, or a held-out number
            that leaves nothing to train on.
    """
    name = os.fspath(name_or_path)
    has_chat_template = tokenizer is not None and bool(tokenizer.chat_template)
    if template == "chat" and tokenizer is not None and not has_chat_template:
        raise PatError("got template 'chat', but the tokenizer has no chat template; pass 'alpaca' or 'auto'")
    source = _load(name, split, config_name, template, has_chat_template)
    rest, apart = _hold_out(source.rows, held_out, seed)
    if apart is None and _is_file_name(held_out):
        apart = _load(str(held_out), "train", None, template, has_chat_template).rows
    return TrainingData(
        train=_take_apart(rest),
        held_out=None if apart is None else _take_apart(apart),
        format=source.format.name,
        template=source.template,
        source=name,
        fingerprint=source.fingerprint,
        num_rows=source.num_rows,
        num_dropped=source.num_rows - len(source.rows),
    )


def check_truncation(tokenizer: "PreTrainedTokenizerBase", dataset: Dataset, max_length: int | None) -> int:
    """How many rows SFTTrainer would leave out because `max_length` tokens hold their prompt and nothing of the response.

    SFTTrainer 1.16 cuts prompt + completion at the end (`keep_start`) and silently drops what then has no response.

    Raises:
        PatError: it would be all rows.
    """
    if max_length is None or "prompt" not in dataset.column_names:
        return 0
    needed = [1 + tokenize_row(tokenizer, row)["completion_mask"].count(0) for row in dataset]
    num_cut = sum(length > max_length for length in needed)
    if num_cut == len(needed):
        raise PatError(
            f"all {num_cut} responses are cut off by max_length {max_length}: the shortest prompt leaves room for a "
            f"response from {min(needed)} tokens on; pass a larger --max_length"
        )
    return num_cut


def _load(
    name: str, split: str, config_name: str | None, template: Literal["auto", "chat", "alpaca"], has_chat_template: bool
) -> _Source:
    """Read and convert all rows of a file or hub dataset; rows without a response are left out."""
    path = Path(name).expanduser()
    local = path.exists() or _is_file_name(name)
    source = _load_local(path, split) if local else _load_hub(name, split, config_name)
    format = detect_format(source.columns, name)
    resolved = _resolve_template(template, format, source.first, has_chat_template)
    rows = source.convert(format, resolved)
    if not len(rows):
        raise PatError(f"{name}: all {source.num_rows} responses are empty; expected at least one with text")
    return _Source(rows, format, resolved, source.fingerprint, source.num_rows)
