"""Prepares the data of a run: reads tokenizer and rows, makes tokens of them, and says what is left out."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import pyarrow.compute
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl import SFTConfig, pack_dataset

from pat.checkpoint.verification_text import verification_batches
from pat.data.counts import Counts, count, count_tokens, longest_of
from pat.data.end_token import ends_of
from pat.data.kept import kept_of, lengths_of
from pat.data.load import TrainingData
from pat.data.record import DataRecord
from pat.data.tables import ROWS_AT_ONCE
from pat.data.tokens import TRAINED_ON, Encoder, Truncation, num_learned
from pat.data.vocabulary import Vocabulary, load_vocabulary
from pat.errors import PatError
from pat.nll import Example, batches_from_examples
from pat.report.progress import bars_of_datasets, phase
from pat.training.inputs.calibration_text import calibration_pieces
from pat.training.inputs.general import General
from pat.training.inputs.parts import (
    SOURCE,
    Part,
    apart_of,
    encoded,
    epoch_of,
    load_parts,
    open_parts,
    records_of,
    warn_of_rows,
)
from pat.training.inputs.stream import Stream

if TYPE_CHECKING:
    from pat.training.arguments import TuneArguments

logger = logging.getLogger(__name__)

NUM_VERIFY_ROWS = 16
"""Held-out examples on which the written checkpoint is compared with the model that was trained."""

MIN_VERIFY_TOKENS = 256
"""With fewer in those examples, the text that comes with the package is compared on as well."""

VERIFY_BATCH_SIZE = 4


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the trainer and for measuring."""

    vocabulary: Vocabulary
    record: DataRecord
    train: Dataset
    """`input_ids` and `labels`, cut or packed as SFTTrainer would; of a stream the first of them."""
    stream: Stream | None
    """All of them, where they are made while training goes on."""
    num_tokens: int
    """Number of tokens of `train`, which is one epoch unless there is a stream."""
    longest: int
    """Number of tokens of the longest row of it."""
    evaluation: Dataset | None
    """Rows in the same columns to evaluate on, where the trainer is to evaluate."""
    ends: Sequence[int]
    """Tokens that end answers."""
    held_out: Sequence[Example]
    """Examples to measure on, cut like those that are trained on."""
    held_out_groups: Sequence[int]
    """Number of the source of each of them; none if there is only one source."""
    held_out_rows: Sequence[Mapping[str, Any]]
    """The held-out rows of the data before they are tokenised, as prompts and completions or texts; empty where
    `--held_out` names a file."""
    held_out_of_base: Sequence[Example] | None
    """The same examples in the base's tokens, where the vocabulary was trimmed."""
    general: General | None
    """Text of another kind to measure on."""
    verify_on: Sequence[dict[str, Tensor]]
    """Batches to compare models on."""
    seconds: float

    def read(self, num_examples: int, epoch: float) -> tuple[DataRecord, int]:
        """Return the record of the data when so many examples were trained on, and about how many tokens these have."""
        if self.stream is not None:
            return self.stream.read(num_examples)
        return self.record, round(epoch * self.num_tokens)

    def trainer_args(self, args: SFTConfig) -> SFTConfig:
        """Return a copy of the trainer's arguments without what has been done to tokenizer and data already."""
        args = copy.deepcopy(args)
        args.dataset_kwargs = {**cast(dict[str, Any], args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.chat_template_path, args.assistant_only_loss = None, False
        if args.include_num_input_tokens_seen == "no":  # counts what is trained on, over interruptions as well
            args.include_num_input_tokens_seen = "all" if is_padding_free(args) else "non_padding"
        return args


def prepare(arguments: TuneArguments, base_config: Any) -> Prepared:
    """Look at tokenizer and data, once, before the weights are loaded.

    Raises:
        PatError: one of them cannot be used, nothing is left to train on, or the model has no embedding for a token.
    """
    started = time.perf_counter()
    sft, run, model = arguments.sft, arguments.run, arguments.model
    shown, skips = not sft.disable_tqdm, run.on_bad_row == "skip"
    vocabulary = load_vocabulary(
        str(model.model_name_or_path),
        base_config,
        revision=model.model_revision,
        chat_template_path=sft.chat_template_path,
        eos_token=sft.eos_token,
        pad_token=sft.pad_token,
    )
    untrimmed = vocabulary
    opened = open_parts(arguments, vocabulary.tokenizer) if run.streaming else []
    sources = [data for data, _ in opened] if opened else load_parts(arguments, vocabulary.tokenizer)
    for data in sources:
        _check_arguments(sft, data)
    cut = Truncation(sft.max_length, sft.truncation_mode, sft.packing, sft.packing_strategy)
    encoder = Encoder(vocabulary.tokenizer, cut, sft.completion_only_loss is not False, skips)
    parts = [encoded(data, encoder, sft.dataset_num_proc, shown=shown) for data in sources]
    of_base: list[Example] | None = None
    apart = apart_of(parts)
    if run.vocabulary_size is not None:
        counted = sum((count_tokens(part.rows) for part in parts), Counter[int]())
        vocabulary = vocabulary.trimmed(run.vocabulary_size, counted, base_config)
        encoder = replace(encoder, tokenizer=vocabulary.tokenizer)
        parts = [encoded(data, encoder, sft.dataset_num_proc, shown=shown) for data in sources]
        if apart:
            apart, of_base = _whole_in_both(apart_of(parts), apart, cut)
    counts = [count(part.rows, shown=shown) for part in parts]
    _check_tokens(vocabulary, counts, apart, arguments.pat.calibration)
    pieces = [list(_pieces(row, cut)) for row in apart]
    if of_base is not None:  # without the rows that have nothing to score
        of_base = [row for row, own in zip(of_base, pieces, strict=True) if own]
    records = records_of(parts, counts, apart, pieces, cut, is_streamed=bool(opened))
    warn_of_rows(parts, counts, apart, cut, base_config, is_streamed=bool(opened))
    stream: Stream | None = None
    if opened:
        stream = Stream.of(arguments, [source for _, source in opened], encoder, vocabulary, records)
        record, num_tokens = stream.record, sum(int(lengths_of(found, cut).sum()) for found in counts)
        kept = concatenate_datasets([kept_of(part.rows, found, cut) for part, found in zip(parts, counts, strict=True)])
    else:
        record, kept, num_tokens = epoch_of(parts, counts, records, cut, weights=run.dataset_weights, seed=sft.seed)
    train = _packed(kept, sft, cut) if stream is None else kept.select_columns(TRAINED_ON)
    held_out = [piece for row in pieces for piece in row]
    of_many = [row[SOURCE] for row, own in zip(apart, pieces, strict=True) for _ in own]
    if not record.sources or record.held_out_source is not None:  # a file is of none of the sources
        of_many = []
    return Prepared(
        vocabulary=vocabulary.asked_as_alpaca() if record.is_alpaca else vocabulary,
        record=record,
        train=train,
        stream=stream,
        num_tokens=_num_packed_tokens(train) if cut.packing else num_tokens,
        longest=cut.max_length if cut.packing and cut.max_length else max(_longest(found, cut) for found in counts),
        evaluation=_evaluation(apart, sft, cut),
        ends=ends_of(found.ends for found in counts),
        held_out=held_out,
        held_out_groups=of_many,
        held_out_rows=_rows_of_the_data(parts),
        held_out_of_base=of_base,
        general=General.of(run.general_text, vocabulary, untrimmed, base_config),
        verify_on=_verification(held_out or kept, vocabulary, base_config),
        seconds=time.perf_counter() - started,
    )


def is_padding_free(sft: SFTConfig) -> bool:
    """Tell whether a batch is one long row, in which there is no padding."""
    return bool(sft.padding_free or (sft.packing and sft.packing_strategy != "wrapped"))


def _check_tokens(
    vocabulary: Vocabulary, counts: Sequence[Counts], apart: Sequence[Example], calibration: str | None
) -> None:
    """Refuse tokens that the model has no embedding for, wherever they are."""
    vocabulary.check(max(found.largest_token for found in counts))
    vocabulary.check(max((token for row in apart for token in row["input_ids"]), default=0))
    if calibration is not None:
        vocabulary.check(max(map(max, calibration_pieces(calibration, vocabulary.tokenizer))))


def _evaluation(apart: Sequence[Example], sft: SFTConfig, cut: Truncation) -> Dataset | None:
    """Return the rows that the trainer evaluates on now and then, as it would cut or pack them; None if it does not."""
    if not apart or sft.eval_strategy == "no":
        return None
    fit = replace(cut, packing=sft.packing if sft.eval_packing is None else sft.eval_packing)
    fitted = [{name: fit(list(row[name])) for name in TRAINED_ON} for row in apart]
    if fit.max_length is not None and not fit.packing:
        fitted = [row for row in fitted if num_learned(row["labels"])]
    if not fitted:
        raise PatError(
            f"Got eval_strategy={str(sft.eval_strategy)!r}, but no response of the {len(apart)} held-out rows is left "
            f"within --max_length {fit.max_length}; raise it {longest_of([len(row['input_ids']) for row in apart])}."
        )
    return _packed(Dataset.from_list(fitted), sft, fit)


def _rows_of_the_data(parts: Sequence[Part]) -> list[Mapping[str, Any]]:
    """Return the held-out rows of all sources."""
    own = (part.data.held_out for part in parts if part.data.held_out_name is None)
    return [row for rows in own if rows is not None for row in rows.to_list()]


def _check_arguments(sft: SFTConfig, data: TrainingData) -> None:
    """Refuse what SFTTrainer would refuse, or ignore, when it looked at this data."""
    if sft.packing and (sft.max_length or 0) < 2:  # a single token has none before it to be learned from
        raise PatError(f"Got packing with --max_length {sft.max_length}; expected the length to pack to, at least 2.")
    if sft.completion_only_loss and data.source.format.name == "text":
        raise PatError("Got --completion_only_loss true with plain text; expected prompts and completions.")
    if sft.assistant_only_loss and data.source.template != "chat":
        raise PatError("Got --assistant_only_loss true, but the data is not under a chat template; leave the flag out.")


def _whole_in_both(
    rows: Sequence[Example], of_base: Sequence[Example], cut: Truncation
) -> tuple[list[Example], list[Example]]:
    """Return the held-out rows that are cut in neither vocabulary, so that both are measured on the same text.

    Raises:
        PatError: none is left.
    """
    lengths = [max(len(a["input_ids"]), len(b["input_ids"])) for a, b in zip(rows, of_base, strict=True)]
    room, needed = cut.max_length or math.inf, longest_of(lengths)
    pairs = [pair for *pair, length in zip(rows, of_base, lengths, strict=True) if length <= room]
    if not pairs:
        raise PatError(f"Got no held-out row that fits within --max_length {cut.max_length}; raise it {needed}.")
    if len(pairs) < len(rows):
        logger.warning(
            "%d of %d held-out rows are not measured, since --max_length %s would cut them otherwise in the trimmed "
            "vocabulary than in the base's; raise it %s.",
            len(rows) - len(pairs),
            len(rows),
            cut.max_length,
            needed,
        )
    return [own for own, _ in pairs], [base for _, base in pairs]


def _packed(rows: Dataset, sft: SFTConfig, cut: Truncation) -> Dataset:
    """Pack and shuffle as SFTTrainer does."""
    rows = rows.select_columns(TRAINED_ON)
    if cut.packing:
        rows = rows.shuffle(seed=sft.seed) if sft.shuffle_dataset else rows
        with phase("Packing", shown=not sft.disable_tqdm), bars_of_datasets(shown=False):
            rows = pack_dataset(rows, cast(int, cut.max_length), cut.packing_strategy)
    return rows.shuffle(seed=sft.seed) if sft.shuffle_dataset else rows


def _num_packed_tokens(train: Dataset) -> int:
    """Return the number of tokens of packed rows."""
    batches = train.with_format("arrow").iter(ROWS_AT_ONCE)
    chunks = (pyarrow.compute.list_value_length(batch["input_ids"]) for batch in batches)
    return sum(pyarrow.compute.sum(chunk).as_py() for chunk in chunks)


def _longest(counts: Counts, cut: Truncation) -> int:
    longest = int(counts.num_tokens.max(initial=0))
    return longest if cut.max_length is None else min(longest, cut.max_length)


def _pieces(row: Mapping[str, list[int]], cut: Truncation) -> Iterator[Example]:
    """Yield an example cut like those that are trained on, if there is something to learn in it."""
    for ids, labels in zip(cut.pieces(row["input_ids"]), cut.pieces(row["labels"]), strict=True):
        if num_learned(labels):
            yield {"input_ids": ids, "labels": labels}


def _verification(examples: Iterable[Any], vocabulary: Vocabulary, base_config: Any) -> list[dict[str, Tensor]]:
    """Return batches of the first examples; where they are short, the text that comes with the package as well."""
    first = [{name: example[name] for name in TRAINED_ON} for example in islice(examples, NUM_VERIFY_ROWS)]
    pad_token_id = cast(int, vocabulary.tokenizer.pad_token_id)
    batches = list(batches_from_examples(first, batch_size=VERIFY_BATCH_SIZE, pad_token_id=pad_token_id))
    if sum(len(example["input_ids"]) for example in first) < MIN_VERIFY_TOKENS:
        max_positions = getattr(base_config, "max_position_embeddings", None)
        batches += verification_batches(
            vocabulary.tokenizer, num_embeddings=vocabulary.num_embeddings, max_positions=max_positions
        )
    return batches
