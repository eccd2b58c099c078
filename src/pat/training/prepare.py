"""Prepares the data of a run: reads tokenizer and rows, makes tokens of them, and says what is left out."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow.compute
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig, pack_dataset

from pat.checkpoint.verification_text import verification_batches
from pat.errors import PatError
from pat.nll import Example, batches_from_examples
from pat.questions import evenly_spaced
from pat.report.progress import bars_of_datasets, phase
from pat.training.calibration_text import calibration_pieces
from pat.training.conversion import TemplateChoice
from pat.training.counts import Counts, count, count_tokens
from pat.training.data import TrainingData, load_training_data
from pat.training.data_record import DataRecord, held_out_remarks, make_record, remarks
from pat.training.tables import ROWS_AT_ONCE
from pat.training.tokens import Encoder, Truncation, encode, learns
from pat.training.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from pat.training.arguments import TuneArguments

logger = logging.getLogger(__name__)

NUM_VERIFY_ROWS = 16
"""Held-out examples on which the written checkpoint is compared with the model that was trained."""

MIN_VERIFY_TOKENS = 256
"""With fewer in those examples, the text that comes with the package is compared on as well."""

VERIFY_BATCH_SIZE = 4

TRAINED_ON = ["input_ids", "labels"]


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the trainer and for measuring."""

    vocabulary: Vocabulary
    record: DataRecord
    train: Dataset
    """`input_ids` and `labels`, cut or packed as SFTTrainer would."""
    num_tokens: int
    """Number of tokens that one epoch trains on."""
    longest: int
    """Number of tokens of the longest row that is trained on."""
    evaluation: Dataset | None
    """Rows in the same columns to evaluate on, where the trainer is to evaluate."""
    held_out: Sequence[Example]
    """Examples to measure on, cut like those that are trained on."""
    held_out_of_base: Sequence[Example] | None
    """The same examples in the base's tokens, where the vocabulary was trimmed."""
    verify_on: Sequence[dict[str, Tensor]]
    """Batches to compare models on."""
    seconds: float

    def trainer_args(self, args: SFTConfig) -> SFTConfig:
        """Return a copy of the trainer's arguments without what has been done to tokenizer and data already."""
        args = copy.deepcopy(args)
        args.dataset_kwargs = {**cast(dict[str, Any], args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        args.chat_template_path, args.assistant_only_loss = None, False
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
    data = load_training_data(
        str(run.dataset_name),
        tokenizer=vocabulary.tokenizer,
        split=run.dataset_train_split,
        config_name=run.dataset_config,
        template=cast(TemplateChoice, run.template),
        held_out=run.held_out,
        seed=sft.seed,
        text_field=sft.dataset_text_field,
        skips=skips,
        shown=shown,
    )
    _check_arguments(sft, data)
    cut = Truncation(sft.max_length, sft.truncation_mode, sft.packing, sft.packing_strategy)
    encoder = Encoder(vocabulary.tokenizer, cut, sft.completion_only_loss is not False, skips)
    rows = encode(data.train_rows, encoder, sft.dataset_num_proc, key=data.key, shown=shown)
    apart: Sequence[Any] = []
    if data.held_out_rows is not None:
        apart = _whole(data.held_out_rows, encoder)
        num_refused = len(data.held_out_rows) - len(apart)
        data = replace(data, num_held_out_bad=data.num_held_out_bad + num_refused)
    of_base: list[Example] | None = None
    if run.vocabulary_size is not None:
        vocabulary = vocabulary.trimmed(run.vocabulary_size, count_tokens(rows), base_config)
        encoder = replace(encoder, tokenizer=vocabulary.tokenizer)
        rows = encode(data.train_rows, encoder, sft.dataset_num_proc, key=data.key, shown=shown)
        if data.held_out_rows is not None:
            apart, of_base = _whole_in_both(_whole(data.held_out_rows, encoder), apart, cut)
    counts = count(rows, shown=shown)
    vocabulary.check(counts.largest_token)
    vocabulary.check(max((token for row in apart for token in row["input_ids"]), default=0))
    if arguments.pat.calibration is not None:
        vocabulary.check(max(map(max, calibration_pieces(arguments.pat.calibration, vocabulary.tokenizer))))
    pieces = [list(_pieces(row, cut)) for row in apart]
    held_out = [piece for row in pieces for piece in row]
    record = replace(make_record(data, counts, cut), num_held_out=sum(map(bool, pieces)))
    for remark in [*remarks(record, data, counts, cut), *held_out_remarks(record, apart, cut)]:
        logger.warning("%s", remark)
    kept = _kept(rows, counts, cut)
    evaluation = None
    if apart and sft.eval_strategy != "no":
        fit = replace(cut, packing=sft.packing if sft.eval_packing is None else sft.eval_packing)
        fitted = [{name: fit(row[name]) for name in TRAINED_ON} for row in apart]
        if fit.max_length is not None and not fit.packing:
            fitted = [row for row in fitted if learns(row["labels"])]
        if not fitted:
            raise PatError(f"Got eval_strategy={str(sft.eval_strategy)!r}, but no held-out response is left; raise it.")
        evaluation = _packed(Dataset.from_list(fitted), sft, fit)
    train = _packed(kept, sft, cut)
    return Prepared(
        vocabulary=vocabulary,
        record=record,
        train=train,
        num_tokens=_num_tokens(train, counts, cut),
        longest=cut.max_length if cut.packing and cut.max_length else _longest(counts, cut),
        evaluation=evaluation,
        held_out=held_out,
        held_out_of_base=of_base,
        verify_on=_verification(held_out or kept, vocabulary, base_config),
        seconds=time.perf_counter() - started,
    )


def prepare_examples(
    name: str, vocabulary: Vocabulary, *, template: TemplateChoice, max_length: int | None, limit: int | None = None
) -> tuple[list[Example], DataRecord]:
    """Return the examples of a dataset to measure a model on, `limit` of them evenly spaced, cut at `max_length`.

    Raises:
        PatError: see `prepare`.
    """
    data = load_training_data(name, tokenizer=vocabulary.tokenizer, template=template, held_out=0)
    spaced = evenly_spaced(len(data.train_rows), limit or None)
    data = replace(data, train_rows=data.train_rows.select(spaced))
    cut = Truncation(max_length)
    rows = encode(data.train_rows, Encoder(vocabulary.tokenizer, cut))
    counts = count(rows)
    vocabulary.check(counts.largest_token)
    record = make_record(data, counts, cut)
    for remark in remarks(record, data, counts, cut):
        logger.warning("%s", remark)
    return _kept(rows, counts, cut).select_columns(TRAINED_ON).to_list(), record


def _check_arguments(sft: SFTConfig, data: TrainingData) -> None:
    """Refuse what SFTTrainer would refuse, or ignore, when it looked at this data."""
    if sft.packing and sft.max_length is None:
        raise PatError("Got packing without a max_length; expected --max_length, the length to pack to.")
    if sft.completion_only_loss and data.source.format.name == "text":
        raise PatError("Got --completion_only_loss true with plain text; expected prompts and completions.")
    if sft.assistant_only_loss and data.source.template != "chat":
        raise PatError("Got --assistant_only_loss true, but the data is not under a chat template; leave the flag out.")


def _whole(rows: Dataset, encoder: Encoder) -> list[Any]:
    """Return the tokens of examples, none of which is cut, nor left without tokens by the chat template."""
    return [row for row in encode(rows, replace(encoder, cut=Truncation())).to_list() if not row["refusal"]]


def _whole_in_both(
    rows: Sequence[Example], of_base: Sequence[Example], cut: Truncation
) -> tuple[list[Example], list[Example]]:
    """Return the held-out rows that are cut in neither vocabulary, so that both are measured on the same text.

    Raises:
        PatError: none is left.
    """
    longest = cut.max_length or math.inf
    pairs = [
        (a, b) for a, b in zip(rows, of_base, strict=True) if max(map(len, (a["input_ids"], b["input_ids"]))) <= longest
    ]
    if not pairs:
        raise PatError(f"Got no held-out row that fits within --max_length {cut.max_length}; raise it.")
    if len(pairs) < len(rows):
        logger.warning(
            "%d of %d held-out rows are not measured, since --max_length %s would cut them otherwise in the trimmed "
            "vocabulary than in the base's.",
            len(rows) - len(pairs),
            len(rows),
            cut.max_length,
        )
    return [own for own, _ in pairs], [base for _, base in pairs]


def _kept(rows: Dataset, counts: Counts, cut: Truncation) -> Dataset:
    """Leave out what was refused and, as SFTTrainer does where it truncates, what has no token to learn left."""
    indices = counts.indices
    if cut.max_length is not None and not cut.packing:
        indices = indices[counts.num_left > 0]
    return rows if len(indices) == len(rows) else rows.select(indices)


def _packed(rows: Dataset, sft: SFTConfig, cut: Truncation) -> Dataset:
    """Pack and shuffle as SFTTrainer does."""
    rows = rows.select_columns(TRAINED_ON)
    if cut.packing:
        rows = rows.shuffle(seed=sft.seed) if sft.shuffle_dataset else rows
        with phase("Packing", shown=not sft.disable_tqdm), bars_of_datasets(shown=False):
            rows = pack_dataset(rows, cast(int, cut.max_length), cut.packing_strategy)
    return rows.shuffle(seed=sft.seed) if sft.shuffle_dataset else rows


def _num_tokens(train: Dataset, counts: Counts, cut: Truncation) -> int:
    """Return the number of tokens that are trained on: of rows that were selected, the table is not looked through."""
    if cut.packing:
        batches = train.with_format("arrow").iter(ROWS_AT_ONCE)
        chunks = (pyarrow.compute.list_value_length(batch["input_ids"]) for batch in batches)
        return sum(pyarrow.compute.sum(chunk).as_py() for chunk in chunks)
    lengths = counts.num_tokens
    if cut.max_length is not None:  # and room for as many, since nothing is packed
        lengths = lengths[counts.num_left > 0].clip(max=cut.max_length)
    return int(lengths.sum(dtype=np.int64))


def _longest(counts: Counts, cut: Truncation) -> int:
    longest = int(counts.num_tokens.max(initial=0))
    return longest if cut.max_length is None else min(longest, cut.max_length)


def _pieces(row: Mapping[str, list[int]], cut: Truncation) -> Iterator[Example]:
    """Yield an example cut like those that are trained on, if there is something to learn in it."""
    for ids, labels in zip(cut.pieces(row["input_ids"]), cut.pieces(row["labels"]), strict=True):
        if learns(labels):
            yield {"input_ids": ids, "labels": labels}


def _verification(examples: Iterable[Any], vocabulary: Vocabulary, base_config: Any) -> list[dict[str, Tensor]]:
    """Return batches of the first examples; where they are short, the text that comes with the package as well."""
    first = [{name: example[name] for name in TRAINED_ON} for example in islice(examples, NUM_VERIFY_ROWS)]
    pad_token_id = cast(int, vocabulary.tokenizer.pad_token_id)
    batches = list(batches_from_examples(first, batch_size=VERIFY_BATCH_SIZE, pad_token_id=pad_token_id))
    if sum(len(example["input_ids"]) for example in first) < MIN_VERIFY_TOKENS:
        max_positions = getattr(base_config, "max_position_embeddings", None)
        batches += verification_batches(vocabulary.tokenizer, max_positions=max_positions)
    return batches
