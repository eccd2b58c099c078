"""Provides what a run calibrates on: the text file of its configuration, or the rows that its trainer trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, cast

import datasets
import torch
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, Subset

from pat import ranks
from pat.errors import PatError, one_line
from pat.training.inputs.calibration_text import BATCH_SIZE, CONTEXT, batches_from_text_file
from pat.tuner.config import PatConfig

TOKEN_COLUMNS = (
    ("input_ids",),
    ("chosen_input_ids",),
    ("completion_input_ids",),
    ("prompt_ids", "chosen_ids"),
    ("prompt_ids", "completion_ids"),
    ("prompt_input_ids",),
    ("prompt_ids",),
)
"""Columns of token ids that trainers prepare; those of the first group that a row has are read one after the other."""

TEXT_COLUMNS = (
    ("prompt", "chosen"),
    ("prompt", "completion"),
    ("prompt",),
    ("text",),
    ("messages",),
    ("chosen",),
    ("completion",),
)
"""Columns of texts or conversations, read in the same way. Beside a prompt, other columns than answers, and what is
neither text nor conversation, are what rewards are reckoned by."""

ROWS_AT_ONCE = 8
"""Rows in a batch where the trainer's own loader does not say."""

REMEDY = (
    "set PatConfig.calibration to a text file, call model.calibrate(dataloader) before training, or use "
    "rotation='none' (a cut of the hidden size alone)."
)


def calibration_batches(config: PatConfig, dataloader: Any, tokenizer: Any) -> Iterable[Mapping[str, Any]]:
    """Return batches to calibrate on, without disturbing the order or the random state of the training data.

    Args:
        config: of the adapter; its text file comes first.
        dataloader: of the training data. Batches that hold `input_ids` are taken as they are; for trainers that keep
            texts (GRPO) or give their tokens other names (ORPO), the rows are read.
        tokenizer: of the trainer, to read texts with.

    Raises:
        PatError: there is no training data, or nothing in it can be read.
    """
    if config.calibration is not None:
        return batches_from_text_file(config.calibration, tokenizer)
    if dataloader is None:
        raise PatError(f"The calibration needs data, but the trainer has no training data; {REMEDY}")
    dataset: Any = getattr(dataloader, "dataset", None)
    loader: Iterable[Any] = dataloader
    num_processes = ranks.num_processes()
    if isinstance(dataset, IterableDatasetShard):  # which gives a process its own rows alone
        dataset = dataset.dataset
    is_streamed = isinstance(dataset, datasets.IterableDataset)
    if is_streamed or (dataset is not None and not isinstance(dataset, IterableDataset)):
        # A loader of its own, since iterating the trainer's would move its sampler on; of a seeded sample, since files
        # are often sorted. A stream begins anew in each loader.
        if not is_streamed:
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
            dataset = Subset(dataset, order)
        # Every process is given the rows of all of them, and reads its share. accelerate's loaders have no batch size.
        batch_size = getattr(dataloader, "batch_size", None)
        batch_size = max(ROWS_AT_ONCE, num_processes) if batch_size is None else batch_size * num_processes
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=dataloader.collate_fn)
    batches = _leaving_the_random_state(loader)
    first = next(batches, None)
    if first is None or (isinstance(first, Mapping) and "input_ids" in first):
        return chain([] if first is None else [first], batches)
    return _batches_of_rows(cast(Iterable[Any], first if dataset is None else dataset), tokenizer)


def _leaving_the_random_state(loader: Iterable[Any]) -> Iterator[Any]:
    with torch.random.fork_rng(devices=[]):  # loaders draw on the CPU, and a model that is evaluated draws nothing
        yield from loader


def _batches_of_rows(rows: Iterable[Any], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Yield padded batches of the rows' own texts or tokens."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    sequences = (ids for row in rows if (ids := _token_ids(row, tokenizer)))
    while pieces := [torch.tensor(ids[:CONTEXT]) for ids in islice(sequences, BATCH_SIZE)]:
        yield {
            "input_ids": pad_sequence(pieces, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(piece) for piece in pieces], batch_first=True),
        }


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(message, Mapping) for message in value)


def _token_ids(row: Any, tokenizer: Any) -> list[int]:
    """Return a row's tokens, of its prompt and its preferred answer; none if its texts are empty.

    Raises:
        PatError: the row has no column that is known, or one that the tokenizer cannot read.
    """
    columns = row if isinstance(row, Mapping) else {}
    for names in TOKEN_COLUMNS:
        if all(columns.get(name) is not None for name in names):
            return [int(token) for name in names for token in columns[name]]
    given = {name for names in TEXT_COLUMNS for name in names if columns.get(name)}
    for names in TEXT_COLUMNS if tokenizer is not None else ():
        parts = [columns[name] for name in names] if given.issuperset(names) else []
        are_texts = all(isinstance(part, str) for part in parts)
        if not parts or not (are_texts or all(map(_is_conversation, parts))):
            continue
        try:
            if are_texts:
                return list(tokenizer("".join(parts), verbose=False)["input_ids"])
            return list(tokenizer.apply_chat_template([*chain(*parts)], return_dict=True)["input_ids"])
        except Exception as error:  # templates raise what they like
            detail = one_line(error)
            raise PatError(
                f"The calibration needs text, but the tokenizer cannot read column(s) {', '.join(names)} of the "
                f"trainer's data ({detail}); {REMEDY}"
            ) from error
    if not given and any(name in columns for names in TEXT_COLUMNS for name in names) and tokenizer is not None:
        return []  # an empty text
    found = ", ".join(map(repr, columns)) or type(row).__name__
    raise PatError(
        f"The calibration needs text, but the trainer's data holds none that can be read ({found}); {REMEDY}"
    )
