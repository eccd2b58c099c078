"""Makes examples in the forms of TRL's SFTTrainer of what a user points at, and keeps some of them apart."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
from datasets import Dataset

from pat.data.conversion import PLACE, ROW, Reading, Source, TemplateChoice
from pat.data.sources import load_source
from pat.data.tables import batches_of, digest
from pat.errors import PatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_HELD_OUT_SHARE = 0.02
DEFAULT_HELD_OUT_ROWS = 200
FEWEST_HELD_OUT_ROWS = 20
"""Below it a mean says little, so that of few rows up to a tenth is held out."""

HeldOut = int | float | str | os.PathLike[str] | None


@dataclass(frozen=True)
class TrainingData:
    """Data in TRL's forms, and where it came from.

    A conversation with several answers gives as many examples, so there may be more of them than rows, unless prompts
    are learned as well.
    """

    train_rows: Dataset
    """Examples to train on, with the columns `PLACE` and `ROW`."""
    held_out_rows: Dataset | None
    source: Source
    name: str
    """Path or hub id as given."""
    held_out_name: str | None
    """Path or hub id of a separate source, if there is one."""
    num_dropped: int
    """Number of rows without a response, which are in neither dataset."""
    num_held_out_dropped: int
    """Number of such rows of a separate source."""
    num_held_out_bad: int = 0
    """Number of its rows that could not be used, and were skipped."""
    first_held_out_bad: str = ""
    """What is wrong with the first of them."""

    key: str | None = None
    """Digest of everything that `train_rows` are made of, where they are a table of the cache."""

    @property
    def train(self) -> Dataset:
        """Examples in columns `prompt` and `completion` (strings or message lists, `tools` beside these), or `text`."""
        return self.train_rows.remove_columns([PLACE, ROW])

    @property
    def held_out(self) -> Dataset | None:
        """Examples that are kept apart, in the same columns."""
        return None if self.held_out_rows is None else self.held_out_rows.remove_columns([PLACE, ROW])

    @property
    def num_rows(self) -> int:
        """Number of rows read from the source."""
        return self.source.num_rows


def load_training_data(
    name_or_path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str = "train",
    config_name: str | None = None,
    template: TemplateChoice = "auto",
    held_out: HeldOut = None,
    most_held_out: int = DEFAULT_HELD_OUT_ROWS,
    seed: int = 0,
    text_field: str = "text",
    skips: bool = False,
    shown: bool = False,
    learns_prompts: bool = False,
) -> TrainingData:
    """Load, check and convert instruction data, and keep some of it apart.

    Args:
        name_or_path: a local file (JSON, JSON lines, Parquet, CSV or TSV, compressed or not), a folder that `datasets`
            has saved or that holds data files, also in subfolders, or a hub dataset id.
        tokenizer: asked only for its chat template.
        split: the split of a hub dataset or a folder, or a slice such as `train[:1000]`; a file is one split, `train`.
        config_name: the configuration of a hub dataset.
        template: how instructions become prompts; "auto": chat if the tokenizer has a chat template, else
            alpaca, and prompt and completion strings as they are.
        held_out: what to keep apart: a number of rows, a share below 1, 0 for nothing, or a file (or hub
            dataset) of its own; by default 2 %, of few rows up to a tenth until there are 20, and at most
            `most_held_out` rows. Numbers may come as strings.
        most_held_out: see there.
        seed: decides which rows are kept apart.
        text_field: the column of plain text; another name than "text" makes the data plain text.
        skips: whether rows that cannot be used are left out, and counted.
        shown: whether progress is shown, of what takes longer than a second.
        learns_prompts: whether prompts are learned as well, so that a conversation is one example.

    Raises:
        PatError: nothing there, unreadable, malformed (with the line) or of unknown format; all responses
            empty; a held-out number that leaves nothing to train on.
    """
    name = os.fspath(name_or_path)
    reading = reading_with(tokenizer, template, text_field, skips=skips, shown=shown, learns_prompts=learns_prompts)
    source = load_source(name, reading, split=split, config_name=config_name)
    amount = parse_held_out(held_out)
    train, held_out_rows, num_held_out_dropped, num_held_out_bad = source.rows, None, 0, 0
    first_held_out_bad = ""
    key = source.key
    if isinstance(amount, str):
        separate = load_source(amount, reading)
        held_out_rows = separate.rows
        num_held_out_dropped = separate.num_dropped
        num_held_out_bad, first_held_out_bad = separate.num_bad, separate.first_bad
    elif count := _num_held_out(source.num_usable, amount, name, most_held_out):
        # Whole rows are kept apart: no conversation is on both sides.
        chosen = random.Random(seed).sample(range(source.num_usable), count)
        is_apart = np.zeros(source.num_usable, dtype=bool)
        is_apart[chosen] = True
        is_apart = np.concatenate([is_apart[batch[ROW].to_numpy()] for batch in batches_of(source.rows, [ROW])])
        key = key and digest(key, count, seed)
        train, held_out_rows = (source.rows.select(np.flatnonzero(is_apart == side)) for side in (False, True))
    return TrainingData(
        train_rows=train,
        held_out_rows=held_out_rows,
        source=source,
        name=name,
        held_out_name=amount if isinstance(amount, str) else None,
        num_dropped=source.num_dropped,
        num_held_out_bad=num_held_out_bad,
        first_held_out_bad=first_held_out_bad,
        num_held_out_dropped=num_held_out_dropped,
        key=key,
    )


def reading_with(
    tokenizer: PreTrainedTokenizerBase | None,
    template: TemplateChoice,
    text_field: str,
    *,
    skips: bool,
    shown: bool,
    learns_prompts: bool = False,
) -> Reading:
    """Return how rows are read; see `load_training_data`.

    Raises:
        PatError: there is no such template.
    """
    chat_template = chat_template_of(tokenizer)
    if template not in get_args(TemplateChoice):
        raise PatError(f"Got template={template!r}; expected one of {', '.join(get_args(TemplateChoice))}.")
    if template == "chat" and not chat_template:
        raise PatError("Got template='chat', but the tokenizer has no chat template; pass 'alpaca' or 'auto'.")
    return Reading(template, chat_template, text_field, skips, shown, learns_prompts)


def chat_template_of(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the source of a tokenizer's chat template, or of all it has; empty if there is none."""
    template = None if tokenizer is None else tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def parse_held_out(held_out: HeldOut) -> int | float | str | None:
    """Return what is to be held out: numbers given as strings become numbers, any other string or path is a name."""
    if held_out is None or isinstance(held_out, int | float):
        return held_out
    name = os.fspath(held_out)
    for number in (int, float):
        try:
            return number(name)
        except ValueError:
            continue
    return name


def _num_held_out(num_rows: int, amount: int | float | None, name: str, most: int) -> int:
    if amount is None:
        # A single row cannot be shared; of more at least one is apart, unless a weight leaves none to this source.
        of_few = min(FEWEST_HELD_OUT_ROWS, num_rows // 10)
        return min(most, max(1, round(DEFAULT_HELD_OUT_SHARE * num_rows), of_few), num_rows - 1)
    count = math.ceil(amount * num_rows) if isinstance(amount, float) and 0 <= amount < 1 else amount
    if not isinstance(count, int) or not 0 <= count < num_rows:
        raise PatError(
            f"Got held_out={amount} for the {num_rows} usable rows of {name}; expected a whole number below "
            f"{num_rows}, a share between 0 and 1, or a file."
        )
    return count
