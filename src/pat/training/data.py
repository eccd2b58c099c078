"""From what a user points at to datasets that TRL's SFTTrainer accepts."""

import math
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from datasets import Dataset

from pat.errors import PatError
from pat.nll import prompt_ids, tokenize_row
from pat.training.formats import Template, split_turns
from pat.training.sources import TemplateChoice, load_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_HELD_OUT_SHARE = 0.02
DEFAULT_HELD_OUT_ROWS = 200

HeldOut = int | float | str | os.PathLike[str] | None


@dataclass(frozen=True)
class TrainingData:
    """Data ready for SFTTrainer, and where it came from.

    `train` and `held_out` have the columns `prompt` and `completion` (both strings or both message lists), or
    `text`. A conversation with several answers gives as many rows, so there may be more rows than were read.
    """

    train: Dataset
    held_out: Dataset | None
    format: str  # "alpaca", "prompt-completion", "messages" or "text"
    template: Template | None  # None: texts are used as they are
    source: str  # path or hub id as given
    held_out_source: str | None  # the separate file, if one was given
    fingerprint: str  # "sha256:…" of a file's content; "revision:…" or "datasets:…" of a hub dataset
    num_rows: int  # rows read from the source
    num_dropped: int  # of these without a response, hence in neither dataset


def load_training_data(
    name_or_path: str | os.PathLike[str],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    split: str = "train",
    config_name: str | None = None,
    template: TemplateChoice = "auto",
    held_out: HeldOut = None,
    seed: int = 0,
) -> TrainingData:
    """Load, check and convert instruction data, and keep some of it apart.

    Args:
        name_or_path: a local `.json`, `.jsonl`, `.parquet` or `.csv` file, or a hub dataset id.
        tokenizer: asked only whether it has a chat template.
        split: the split of a hub dataset, or a slice such as `train[:1000]`; a file is one split, `train`.
        config_name: the configuration of a hub dataset.
        template: how instructions become prompts; "auto": chat if the tokenizer has a chat template, else
            alpaca, and prompt and completion strings as they are.
        held_out: what to keep apart: a number of rows, a share below 1, 0 for nothing, or a file (or hub
            dataset) of its own; by default 2 %, at most 200 rows. Numbers may come as strings.
        seed: decides which rows are kept apart.

    Raises:
        PatError: nothing there, unreadable, malformed (with the line) or of unknown format; all responses
            empty; a held-out number that leaves nothing to train on.
    """
    name = os.fspath(name_or_path)
    has_chat_template = tokenizer is not None and bool(tokenizer.chat_template)
    if template not in get_args(TemplateChoice):
        raise PatError(f"Got template={template!r}; expected one of {', '.join(get_args(TemplateChoice))}.")
    if template == "chat" and not has_chat_template:
        raise PatError("Got template='chat', but the tokenizer has no chat template; pass 'alpaca' or 'auto'.")
    source = load_source(
        name, split=split, config_name=config_name, template=template, has_chat_template=has_chat_template
    )
    amount = _parse_held_out(held_out)
    apart: Dataset | None
    if isinstance(amount, str):
        rest = source.rows
        apart = load_source(
            amount, split="train", config_name=None, template=template, has_chat_template=has_chat_template
        ).rows
    else:
        rest, apart = _split(source.rows, _num_held_out(len(source.rows), amount, name), seed)
    return TrainingData(
        train=_responses(rest),
        held_out=None if apart is None else _responses(apart),
        format=source.format.name,
        template=source.template,
        source=name,
        held_out_source=amount if isinstance(amount, str) else None,
        fingerprint=source.fingerprint,
        num_rows=source.num_rows,
        num_dropped=source.num_rows - len(source.rows),
    )


def check_truncation(tokenizer: "PreTrainedTokenizerBase", dataset: Dataset, max_length: int | None) -> int:
    """How many rows of `dataset` keep nothing of their response when cut at `max_length` tokens.

    SFTTrainer 1.16 cuts prompt + completion at the end (`keep_start`) and silently drops such rows.

    Raises:
        PatError: all rows are such.
    """
    if max_length is None or "prompt" not in dataset.column_names:
        return 0
    # The completion starts at the end of the prompt's own tokens or before it, so most rows need only these.
    long_rows = [row for row in dataset if len(prompt_ids(tokenizer, row["prompt"])) >= max_length]
    needed = [1 + tokenize_row(tokenizer, row)["completion_mask"].count(0) for row in long_rows]
    num_cut = sum(length > max_length for length in needed)
    if num_cut == len(dataset):
        raise PatError(
            f"All {num_cut} responses are truncated away: got max_length {max_length}, but even the shortest "
            f"prompt with one response token takes {min(needed)}; pass a larger --max_length."
        )
    return num_cut


def _parse_held_out(held_out: HeldOut) -> int | float | str | None:
    """Numbers given as strings become numbers, anything else given as a string or path stays a name."""
    if held_out is None or isinstance(held_out, int | float):
        return held_out
    name = os.fspath(held_out)
    for number in (int, float):
        try:
            return number(name)
        except ValueError:
            continue
    return name


def _num_held_out(num_rows: int, amount: int | float | None, name: str) -> int:
    if amount is None:
        # A single row cannot be shared; every other source keeps at least one apart.
        return min(DEFAULT_HELD_OUT_ROWS, max(1, round(DEFAULT_HELD_OUT_SHARE * num_rows)), num_rows - 1)
    count = math.ceil(amount * num_rows) if isinstance(amount, float) and 0 <= amount < 1 else amount
    if not isinstance(count, int) or not 0 <= count < num_rows:
        raise PatError(
            f"Got held_out={amount} for the {num_rows} usable rows of {name}; expected a whole number below "
            f"{num_rows}, a share between 0 and 1, or a file."
        )
    return count


def _split(rows: Dataset, num_held_out: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """(rest, held out), both in the original order."""
    if num_held_out == 0:
        return rows, None
    chosen = set(random.Random(seed).sample(range(len(rows)), num_held_out))
    rest = [index for index in range(len(rows)) if index not in chosen]
    return rows.select(rest), rows.select(sorted(chosen))


def _responses(rows: Dataset) -> Dataset:
    """Conversations as one row per answer. Done after the split: no conversation is on both sides of it."""
    if "messages" not in rows.column_names:
        return rows

    def expand(batch: dict[str, list[list[dict[str, str]]]]) -> dict[str, list[list[dict[str, str]]]]:
        turns = [turn for messages in batch["messages"] for turn in split_turns(messages)]
        return {key: [turn[key] for turn in turns] for key in ("prompt", "completion")}

    return rows.map(expand, batched=True, remove_columns=["messages"])
