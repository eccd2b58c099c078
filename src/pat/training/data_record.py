"""Record of the data of a run, with a line for everything of it that is left out, cut or doubtful."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from pat.checkpoint.card import shown_name
from pat.errors import PatError
from pat.training.data import TrainingData
from pat.training.sources import PLACE
from pat.training.tokens import Truncation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataRecord:
    """The data of a run, for `results.json`. An example is what one answer of a row became, or one text."""

    source: str
    held_out_source: str | None
    format: str
    template: str | None
    fingerprint: str
    num_rows: int  # of the source
    num_dropped: int  # rows without a response
    unused_columns: tuple[str, ...]
    num_examples: int  # not held out
    num_tokens: int  # of these examples, before the cut
    num_target_tokens: int  # of these tokens, to be learned
    num_truncated: int  # examples that lose tokens to learn
    num_cut_tokens: int
    num_cut_target_tokens: int
    num_cut_away: int  # examples that lose all tokens to learn
    num_unlearned_openings: int  # rows whose conversation opens with an answer, which is context alone
    num_held_out_dropped: int  # rows of a separate source without a response
    num_held_out: int = 0  # examples that are measured

    def describe(self) -> str:
        """Say in one line what was understood."""
        template = {"chat": "chat template", "alpaca": "Alpaca wording"}.get(self.template or "", "no template")
        return (
            f"Data: {self.source} ({self.format}, {template}), {self.num_rows:,} rows; {self.num_examples:,} examples "
            f"with {self.num_tokens:,} tokens to train on, {self.num_target_tokens:,} of them to learn, "
            f"{self.num_truncated:,} truncated; {self.num_held_out:,} held out."
        )


def make_record(data: TrainingData, rows: Dataset, cut: Truncation) -> DataRecord:
    """Count what encoded examples have and lose.

    Raises:
        PatError: nothing is left to learn.
    """
    tokens, targets, left = (np.array(rows[name][:]) for name in ("num_tokens", "num_targets", "num_left"))
    if not left.any():
        raise PatError(
            f"All {len(rows)} responses are truncated away: got max_length {cut.max_length}, but even the shortest "
            f"prompt with one response token takes {(tokens - targets).min() + 1}; pass a larger --max_length."
        )
    return DataRecord(
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
        num_cut_tokens=0 if cut.room is None else int((tokens - cut.room).clip(0).sum()),
        num_cut_target_tokens=int((targets - left).sum()),
        num_cut_away=int((left == 0).sum()),
        num_unlearned_openings=_num_openings(data, rows),
        num_held_out_dropped=data.num_held_out_dropped,
    )


def remarks(
    record: DataRecord, data: TrainingData, rows: Dataset, cut: Truncation, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield a line for everything of the data that is left out, cut, or not as it may be meant."""
    all_examples = f"of {record.num_examples:,} examples"
    if record.num_dropped:
        yield f"{record.num_dropped:,} of {record.num_rows:,} rows have no response and are left out."
    if record.num_held_out_dropped:
        yield f"{record.num_held_out_dropped:,} held-out rows have no response and are left out."
    if record.num_unlearned_openings:
        yield (
            f"In {record.num_unlearned_openings:,} rows the conversation opens with a message of the assistant; it is "
            "read and not learned, as nothing comes before it."
        )
    if record.unused_columns:
        yield f"These columns are not read: {', '.join(record.unused_columns)}."
    unread = [names for names in rows["unread"][:] if names]
    if unread:
        names = sorted({name for names in unread for name in names.split(", ")})
        yield (
            f"The chat template does not mention {', '.join(names)}, so what {len(unread):,} {all_examples} say there "
            "is left out; use a --chat_template_path that expresses it."
        )
    if 2 * (num_glued := _num_glued(data, tokenizer)) > len(data.train_rows):
        yield (
            f"In {num_glued:,} of {len(data.train_rows):,} examples the completion follows its prompt without a space, "
            "a line break or a template between them; end prompts with one, or use --template chat or alpaca."
        )
    if cut.room is not None and record.num_cut_tokens:
        text, num_longer = record.format == "text", sum(count > cut.room for count in rows["num_tokens"][:])
        yield (
            f"{num_longer:,} {all_examples} are cut at --max_length {cut.max_length}: {record.num_cut_tokens:,} of "
            f"{record.num_tokens:,} tokens are dropped, {record.num_cut_target_tokens:,} of them to learn; raise it"
            + (", or drop none by --packing true --packing_strategy wrapped." if text else ".")
        )
    if record.num_truncated and record.format != "text" and not cut.keeps_end:
        yield f"{record.num_truncated:,} {all_examples} lose the end of their response, so that it never stops."
    if record.num_cut_away:
        yield (
            f"{record.num_cut_away:,} {all_examples} have no response left within --max_length {cut.max_length} and do "
            "not count; raise it, or keep responses by --truncation_mode keep_end."
        )


def held_out_remarks(record: DataRecord, rows: Sequence[Mapping[str, Any]], cut: Truncation) -> Iterator[str]:
    """Yield a line if held-out examples, given whole, are cut."""
    num_longer = 0 if cut.room is None else sum(len(row["input_ids"]) > cut.room for row in rows)
    if num_longer:
        yield (
            f"{num_longer:,} of {len(rows):,} held-out examples are cut likewise; {record.num_held_out:,} have a "
            "response left to be measured."
        )


def _num_openings(data: TrainingData, rows: Dataset) -> int:
    """Count rows whose conversation opens with an answer; a prompt of its own is meant to be context alone."""
    opens = rows["opens"][:] if data.source.format.name == "messages" else []
    return len({place for place, is_opening in zip(data.train_rows[PLACE][:], opens, strict=False) if is_opening})


def _num_glued(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count prompts and completions without anything that tells where one ends and the other begins."""
    if data.source.template is not None or data.source.format.name != "prompt-completion":
        return 0
    ends = tuple(tokenizer.get_added_vocab())
    pairs = zip(data.train_rows["prompt"][:], data.train_rows["completion"][:], strict=True)
    return sum(not (p[-1:].isspace() or c[:1].isspace() or p.endswith(ends)) for p, c in pairs)
