"""Everything in which a run looks at data: tokenizer, rows, tokens, what is trained on, and what is said about it."""

from __future__ import annotations

import copy
import logging
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

from pat.checkpoint.card import shown_name
from pat.checkpoint.verification_text import verification_batches
from pat.errors import PatError
from pat.nll import Example, batches_from_examples
from pat.training.data import TrainingData, load_training_data
from pat.training.sources import TemplateChoice
from pat.training.tokens import Cut, Encoder, encode, learns
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
class DataRecord:
    """What a run is trained and measured on, for `results.json`."""

    source: str
    held_out_source: str | None
    format: str
    template: str | None
    fingerprint: str
    num_rows: int
    """Rows of the source."""
    num_dropped: int
    """Of these, rows without a response."""
    unused_columns: tuple[str, ...]
    num_examples: int
    """Examples that rows became; a conversation gives one for each answer."""
    num_tokens: int
    """Tokens of these examples, before anything is cut."""
    num_target_tokens: int
    """Of these, tokens to learn."""
    num_truncated: int
    """Examples that lose tokens to learn."""
    num_cut_tokens: int
    num_cut_target_tokens: int
    num_cut_away: int
    """Examples that have no token to learn left, and so are not trained on."""
    num_held_out: int = 0
    """Held-out examples that are measured."""

    def describe(self) -> str:
        """Say in one line what was understood."""
        template = {"chat": "chat template", "alpaca": "Alpaca wording"}.get(self.template or "", "no template")
        return (
            f"Data: {self.source} ({self.format}, {template}), {self.num_rows:,} rows; {self.num_examples:,} examples "
            f"with {self.num_tokens:,} tokens to train on, {self.num_target_tokens:,} of them to learn, "
            f"{self.num_truncated:,} truncated; {self.num_held_out:,} held out."
        )


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the trainer and for measuring."""

    vocabulary: Vocabulary
    record: DataRecord
    train: Dataset
    """`input_ids` and `labels`, cut or packed as SFTTrainer would."""
    evaluation: Dataset | None
    """Likewise, where the trainer is to evaluate."""
    held_out: Sequence[Example]
    """Examples to measure on, cut like those that are trained on."""
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
    vocabulary = load_vocabulary(
        str(model.model_name_or_path),
        base_config.get_text_config().vocab_size,
        revision=model.model_revision,
        chat_template_path=sft.chat_template_path,
        eos_token=sft.eos_token,
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
    )
    _check_arguments(sft, data)
    cut = Cut(sft.max_length, sft.truncation_mode, sft.packing, sft.packing_strategy)
    encoder = Encoder(vocabulary.tokenizer, cut, completion_only=sft.completion_only_loss is not False)
    rows = encode(data.train_rows, encoder, data.source.place, sft.dataset_num_proc)
    apart: Sequence[Any] = []
    if data.held_out_rows is not None:
        apart = encode(data.held_out_rows, replace(encoder, cut=Cut()), data.held_out_source.place).to_list()
    pieces = [list(_pieces(row, cut)) for row in apart]
    record = replace(_looked_at(data, rows, cut, vocabulary), num_held_out=sum(map(bool, pieces)))
    if record.num_held_out < len(apart):
        logger.warning("Held-out figures stand on %d of %d examples, likewise.", record.num_held_out, len(apart))
    held_out = [piece for row in pieces for piece in row]
    vocabulary.check(max((token for example in held_out for token in example["input_ids"]), default=0))
    kept = _kept(rows, cut)
    evaluation = None
    if apart and sft.eval_strategy != "no":
        fit = replace(cut, packing=sft.packing if sft.eval_packing is None else sft.eval_packing)
        fitted = [{name: fit(row[name]) for name in TRAINED_ON} for row in apart]
        if fit.max_length is not None and not fit.packing:
            fitted = [row for row in fitted if learns(row["labels"])]
        if not fitted:
            raise PatError(f"Got eval_strategy={str(sft.eval_strategy)!r}, but no held-out response is left; raise it.")
        evaluation = _packed(Dataset.from_list(fitted), sft, fit)
    return Prepared(
        vocabulary=vocabulary,
        record=record,
        train=_packed(kept, sft, cut),
        evaluation=evaluation,
        held_out=held_out,
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
    count, total = min(limit or len(data.train_rows), len(data.train_rows)), len(data.train_rows)
    some = data.train_rows.select([index * total // count for index in range(count)])
    cut = Cut(max_length)
    rows = encode(some, Encoder(vocabulary.tokenizer, cut), data.source.place)
    record = _looked_at(data, rows, cut, vocabulary)
    return _kept(rows, cut).select_columns(TRAINED_ON).to_list(), record


def _check_arguments(sft: SFTConfig, data: TrainingData) -> None:
    """Refuse what SFTTrainer would refuse, or ignore, when it looked at this data."""
    if sft.packing and sft.max_length is None:
        raise PatError("Got packing without a max_length; expected --max_length, the length to pack to.")
    if sft.completion_only_loss and data.source.format.name == "text":
        raise PatError("Got --completion_only_loss true with plain text; expected prompts and completions.")
    if sft.assistant_only_loss and data.source.template != "chat":
        raise PatError("Got --assistant_only_loss true, but the data is not under a chat template; leave the flag out.")


def _looked_at(data: TrainingData, rows: Dataset, cut: Cut, vocabulary: Vocabulary) -> DataRecord:
    """Count what encoded examples lose, say so, and check their tokens."""
    tokens, targets, left = (np.array(rows[name][:]) for name in ("num_tokens", "num_targets", "num_left"))
    room = tokens.max() if cut.max_length is None or cut.splits else cut.max_length
    if not left.any():
        raise PatError(
            f"All {len(rows)} responses are truncated away: got max_length {cut.max_length}, but even the shortest "
            f"prompt with one response token takes {(tokens - targets).min() + 1}; pass a larger --max_length."
        )
    record = DataRecord(
        source=shown_name(data.name),
        held_out_source=data.held_out_name and shown_name(data.held_out_name),
        format=data.source.format.name,
        template=data.source.template,
        fingerprint=data.source.fingerprint,
        num_rows=data.num_rows,
        num_dropped=data.num_dropped,
        unused_columns=data.source.unread,
        num_examples=len(rows),
        num_tokens=int(tokens.sum()),
        num_target_tokens=int(targets.sum()),
        num_truncated=int((left < targets).sum()),
        num_cut_tokens=int((tokens - room).clip(0).sum()),
        num_cut_target_tokens=int((targets - left).sum()),
        num_cut_away=int((left == 0).sum()),
    )
    for remark in _remarks(record, cut, int((tokens > room).sum()), rows["unread"][:], _num_glued(data, vocabulary)):
        logger.warning("%s", remark)
    vocabulary.check(pyarrow.compute.max(pyarrow.compute.list_flatten(rows.data["input_ids"])).as_py())
    return record


def _remarks(record: DataRecord, cut: Cut, num_longer: int, unread: Sequence[str], num_glued: int) -> Iterator[str]:
    """Yield a line for everything of the data that is left out, cut or not as it may be meant."""
    examples = f"of {record.num_examples:,} examples"
    if record.num_dropped:
        yield f"{record.num_dropped:,} of {record.num_rows:,} rows have no response and are left out."
    if record.unused_columns:
        yield f"These columns are not read: {', '.join(record.unused_columns)}."
    if any(unread):
        names = sorted({name for names in unread for name in names.split(", ") if name})
        yield (
            f"The chat template does not mention {', '.join(names)}, which {sum(map(bool, unread)):,} {examples} have; "
            "it is left out. Use a --chat_template_path that expresses it."
        )
    if 2 * num_glued > record.num_examples:
        yield (
            f"In {num_glued:,} {examples} the completion follows its prompt without space, line break or template; "
            "expected a separator at the end of the prompt, or --template chat or alpaca."
        )
    if num_longer:
        text = record.format == "text"
        ends = cut.packing or cut.truncation_mode == "keep_start"
        yield (
            f"{num_longer:,} {examples} are longer than --max_length {cut.max_length} and are cut: "
            f"{record.num_cut_tokens:,} of {record.num_tokens:,} tokens are dropped, "
            f"{record.num_cut_target_tokens:,} of them to learn"
            + (f" ({record.num_truncated:,} responses never end)" if ends and record.num_truncated and not text else "")
            + ("; raise it, or drop none by --packing true --packing_strategy wrapped." if text else "; raise it.")
        )
    if record.num_cut_away:
        yield (
            f"{record.num_cut_away:,} {examples} have no response left within --max_length {cut.max_length} and do not "
            "count; raise it, or keep responses by --truncation_mode keep_end."
        )


def _num_glued(data: TrainingData, vocabulary: Vocabulary) -> int:
    """Count prompts that end, and completions that begin, without anything that tells them apart."""
    if data.source.template is not None or data.source.format.name != "prompt-completion":
        return 0
    ends = tuple(vocabulary.tokenizer.get_added_vocab())
    pairs = zip(data.train_rows["prompt"], data.train_rows["completion"], strict=True)
    return sum(not (p[-1:].isspace() or c[:1].isspace() or p.endswith(ends)) for p, c in pairs)


def _kept(rows: Dataset, cut: Cut) -> Dataset:
    """Leave out, as SFTTrainer does where it truncates, what has no token to learn left."""
    if cut.max_length is None or cut.packing:
        return rows
    indices = [index for index, left in enumerate(rows["num_left"][:]) if left]
    return rows if len(indices) == len(rows) else rows.select(indices)


def _packed(rows: Dataset, sft: SFTConfig, cut: Cut) -> Dataset:
    """Pack and shuffle as SFTTrainer does."""
    rows = rows.select_columns(TRAINED_ON)
    if cut.packing:
        rows = rows.shuffle(seed=sft.seed) if sft.shuffle_dataset else rows
        rows = pack_dataset(rows, cast(int, cut.max_length), cut.packing_strategy)
    return rows.shuffle(seed=sft.seed) if sft.shuffle_dataset else rows


def _pieces(row: Mapping[str, list[int]], cut: Cut) -> Iterator[Example]:
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
