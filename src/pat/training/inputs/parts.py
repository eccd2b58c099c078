"""The sources of a run: the rows of each as tokens, with what is kept apart of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from datasets import Dataset

from pat.data.conversion import TemplateChoice
from pat.data.counts import Counts
from pat.data.kept import kept_of, lengths_of
from pat.data.load import (
    DEFAULT_HELD_OUT_ROWS,
    TrainingData,
    load_training_data,
    parse_held_out,
    reading_with,
)
from pat.data.mixture import apportioned, drawn, mixed, quotas, shares
from pat.data.record import DataRecord, combined, make_record
from pat.data.remarks import held_out_remarks, overlap_remarks, position_remarks, remarks
from pat.data.sources import load_source
from pat.data.streamed import StreamedSource, open_source
from pat.data.tokens import Encoder, Truncation, encode
from pat.errors import PatError
from pat.named import check_dataset
from pat.nll import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pat.training.arguments import TuneArguments


logger = logging.getLogger(__name__)

_OF_FIRST_ROWS = "In the first rows of the stream: "

SOURCE = "source"
"""Key of a held-out example with the number of its source."""


@dataclass(frozen=True)
class Part:
    """One source of a run."""

    data: TrainingData
    rows: Dataset
    """Tokens of the examples to train on, with the columns of `pat.data.tokens.FEATURES`."""
    apart: Sequence[Mapping[str, Any]]
    """Tokens of those that are kept apart, none of which is cut."""


@contextmanager
def _naming_the_way_out() -> Iterator[None]:
    """Say, where a row cannot be used, which flag of `pat tune` leaves such rows out."""
    try:
        yield
    except PatError as error:
        if not error.of_row:
            raise
        raise PatError(f"{error} Such rows are left out with --on_bad_row skip.", of_row=True) from error


@_naming_the_way_out()
def load_parts(arguments: TuneArguments, tokenizer: PreTrainedTokenizerBase) -> list[TrainingData]:
    """Load the sources of a run, and keep rows of each apart.

    Of a number of rows to be held out each source gives its share by weight, without weights as many as the others; of
    a share of the rows each gives that of its own.

    Raises:
        PatError: see `load_training_data`; the message names the source.
    """
    sft, run = arguments.sft, arguments.run
    for name in run.dataset_names:
        check_dataset(name)
    return [
        load_training_data(
            name,
            tokenizer=tokenizer,
            split=run.dataset_train_split,
            config_name=run.dataset_config,
            template=cast(TemplateChoice, run.template),
            held_out=own,
            most_held_out=most,
            seed=sft.seed,
            text_field=sft.dataset_text_field,
            skips=run.on_bad_row == "skip",
            shown=not sft.disable_tqdm,
            learns_prompts=sft.completion_only_loss is False,
        )
        for name, (own, most) in zip(run.dataset_names, _held_out_of_each(arguments), strict=True)
    ]


@_naming_the_way_out()
def open_parts(
    arguments: TuneArguments, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[TrainingData, StreamedSource]]:
    """Open the sources of a run that is streamed: each with its first rows, of which some are held out.

    Raises:
        PatError: see `open_source`.
    """
    sft, run = arguments.sft, arguments.run
    template = cast(TemplateChoice, run.template)
    reading = reading_with(
        tokenizer,
        template,
        sft.dataset_text_field,
        skips=run.on_bad_row == "skip",
        shown=not sft.disable_tqdm,
        learns_prompts=sft.completion_only_loss is False,
    )
    for name in run.dataset_names:
        check_dataset(name)
    opened = []
    for name, (own, most) in zip(run.dataset_names, _held_out_of_each(arguments), strict=True):
        num = 0 if isinstance(own, str) else most if own is None else int(own)
        split, config = run.dataset_train_split, run.dataset_config
        source, head, apart = open_source(name, reading, num, split=split, config_name=config)
        separate = load_source(own, reading) if isinstance(own, str) else None
        data = TrainingData(
            train_rows=head.rows,
            held_out_rows=apart if separate is None else separate.rows,
            source=head,
            name=name,
            held_out_name=own if isinstance(own, str) else None,
            num_dropped=head.num_dropped,
            num_held_out_dropped=separate.num_dropped if separate else 0,
            num_held_out_bad=separate.num_bad if separate else 0,
            first_held_out_bad=separate.first_bad if separate else "",
        )
        opened.append((data, source))
    return opened


def _held_out_of_each(arguments: TuneArguments) -> list[tuple[Any, int]]:
    """Return what each source holds out, and how many rows at most if that is not said."""
    names, amount = arguments.run.dataset_names, parse_held_out(arguments.run.held_out)
    weights = arguments.run.dataset_weights or [1.0] * len(names)
    amounts: list[Any] = [amount] * len(names)
    if isinstance(amount, str):
        amounts[1:] = [0] * (len(names) - 1)
    elif isinstance(amount, int) and len(names) > 1:
        if amount < 0:
            raise PatError(f"Got held_out={amount}; expected a number of rows, a share below 1, or a file.")
        amounts = list(apportioned(amount, weights))
    return list(zip(amounts, apportioned(DEFAULT_HELD_OUT_ROWS, weights), strict=True))


@_naming_the_way_out()
def encoded(data: TrainingData, encoder: Encoder, num_proc: int | None, *, shown: bool) -> Part:
    """Make tokens of a source; what the chat template refuses of the rows that are kept apart is counted."""
    rows = encode(data.train_rows, encoder, num_proc, key=data.key, shown=shown)
    apart: list[Any] = []
    if data.held_out_rows is not None:
        found = encode(data.held_out_rows, replace(encoder, cut=Truncation())).to_list()
        usable = [index for index, row in enumerate(found) if not row["refusal"]]
        apart = [found[index] for index in usable]
        num_bad = data.num_held_out_bad + len(found) - len(apart)
        data = replace(data, held_out_rows=data.held_out_rows.select(usable), num_held_out_bad=num_bad)
    return Part(data, rows, apart)


def apart_of(parts: Sequence[Part]) -> list[Any]:
    """Return the held-out examples of all sources, each with the number of its own."""
    return [{**row, SOURCE: number} for number, part in enumerate(parts) for row in part.apart]


def records_of(
    parts: Sequence[Part],
    counts: Sequence[Counts],
    apart: Sequence[Any],
    pieces: Sequence[Sequence[Example]],
    cut: Truncation,
    *,
    is_streamed: bool = False,
) -> list[DataRecord]:
    """Return the record of each source, and say what of it is left out, cut or doubtful.

    Args:
        parts: the sources.
        counts: of their tokens.
        apart: held-out examples of all of them.
        pieces: what is measured of each of these.
        cut: how sequences are made to fit.
        is_streamed: whether they are only the first rows of their sources.

    Raises:
        PatError: of a source nothing is left to learn.
    """
    records = []
    for number, (part, found) in enumerate(zip(parts, counts, strict=True)):
        rows = [(row, own) for row, own in zip(apart, pieces, strict=True) if row[SOURCE] == number]
        try:
            record = replace(
                make_record(part.data, found, cut),
                num_held_out=sum(bool(own) for _, own in rows),
                is_streamed=is_streamed,
            )
        except PatError as error:
            raise PatError(str(error) if len(parts) == 1 else f"{part.data.name}: {error}") from error
        said = [*remarks(record, part.data, found, cut), *held_out_remarks(record, [row for row, _ in rows], cut)]
        for remark in said:
            named = remark if len(parts) == 1 else f"{record.source}: {remark}"
            logger.warning("%s%s", _OF_FIRST_ROWS if is_streamed else "", named)
        records.append(record)
    return records


def warn_of_rows(
    parts: Sequence[Part],
    counts: Sequence[Counts],
    apart: Sequence[Any],
    cut: Truncation,
    base_config: Any,
    *,
    is_streamed: bool,
) -> None:
    """Say what is doubtful of the rows of all sources together: longer than the base reads, or held out and learned."""
    said = list(position_remarks(counts, cut, base_config))
    if any(part.data.held_out_name is not None for part in parts):  # else rows are on one side only
        said += overlap_remarks(apart, [part.rows for part in parts], cut)
    for remark in said:
        logger.warning("%s%s", _OF_FIRST_ROWS if is_streamed else "", remark)


def epoch_of(
    parts: Sequence[Part],
    counts: Sequence[Counts],
    records: Sequence[DataRecord],
    cut: Truncation,
    *,
    weights: Sequence[float] | None,
    seed: int,
) -> tuple[DataRecord, Dataset, int]:
    """Return the record of the data, the examples of one epoch, and how many tokens they have if nothing is packed.

    Raises:
        PatError: the weight of a source has its examples come too often.
    """
    kept = [kept_of(part.rows, found, cut) for part, found in zip(parts, counts, strict=True)]
    lengths = [lengths_of(found, cut) for found in counts]
    if len(parts) == 1:
        return records[0], kept[0], int(lengths[0].sum(dtype=np.int64))
    num_kept = [len(rows) for rows in kept]
    num_drawn = quotas([record.source for record in records], num_kept, weights)
    rng = np.random.default_rng(seed)
    draws = [drawn(num, quota, rng) for num, quota in zip(num_kept, num_drawn, strict=True)]
    num_tokens = sum(int(of[draw].sum(dtype=np.int64)) for of, draw in zip(lengths, draws, strict=True))
    times = [quota / num for quota, num in zip(num_drawn, num_kept, strict=True)]
    return combined(records, shares(num_drawn), times), mixed(kept, draws, rng), num_tokens
