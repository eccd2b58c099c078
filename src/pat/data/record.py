"""Record of the data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pat.checkpoint.card import shown_name
from pat.data.counts import Counts, counted, longest_of
from pat.data.load import TrainingData
from pat.data.rendered import ANSWER
from pat.data.tokens import Truncation
from pat.errors import PatError


def _describe_template(template: str | None) -> str:
    return {"chat": "chat template", "alpaca": "Alpaca wording"}.get(template or "", "no template")


@dataclass(frozen=True)
class SourceRecord:
    """One of several sources that are mixed, for `results.json`."""

    source: str
    share: float  # of it in the examples that are trained on
    times: float | None  # how often each of its examples comes in an epoch, in the mean; of a stream it is not known
    format: str
    template: str | None
    fingerprint: str
    num_rows: int
    num_dropped: int  # rows without a response
    num_skipped: int  # rows, and examples that the chat template refuses, that could not be used
    unused_columns: tuple[str, ...]
    num_examples: int  # not held out
    num_tokens: int  # of these examples, before the cut
    num_target_tokens: int  # of these tokens, to be learned
    num_held_out: int  # examples that are measured

    def describe(self) -> str:
        """Say in a few words what was understood, and how often its examples come."""
        left_out = f", {self.num_skipped:,} skipped" if self.num_skipped else ""
        of_all = f"{self.share:.1%} of what is trained on".replace("%", " %")
        times = ""
        if self.times is not None:
            often = f"{self.times:.2f}".rstrip("0").rstrip(".")
            times = ", once each" if often == "1" else f", {often} times each"
        return (
            f"{self.source} ({self.format}, {_describe_template(self.template)}): {self.num_examples:,} examples"
            f"{left_out}, {of_all}{times}"
        )


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
    num_skipped: int = 0  # rows, and examples that the chat template refuses, that could not be used
    num_without_targets: int = 0  # examples of which the chat template leaves nothing to learn
    num_prompts_in_part: int = 0  # examples of which it leaves out messages other than the answer
    num_answers_in_part: int = 0  # examples of which it leaves out parts of the answer
    num_double_bos: int = 0  # examples that begin with two beginning-of-sequence tokens
    num_double_eos: int = 0  # examples that end with two end-of-sequence tokens
    num_held_out: int = 0  # examples that are measured
    sources: tuple[SourceRecord, ...] = ()  # of several that are mixed; the counts above are sums over them
    is_streamed: bool = False  # the counts are of what was read until the end of training, each row counted once

    @property
    def is_alpaca(self) -> bool:
        """Whether all that is trained on was put into Alpaca's words; plain text is not, whatever template is named."""
        return all(part.template == "alpaca" and part.format != "text" for part in self.sources or (self,))

    @property
    def num_left_out(self) -> int:
        """Number of examples that have nothing to learn, and are not trained on."""
        return self.num_cut_away + self.num_without_targets

    def describe_read(self) -> str:
        """Say in one line what was read of a stream."""
        return (
            f"{self.source}: {self.num_rows:,} rows were read, {self.num_dropped:,} of them without a response, "
            f"{self.num_skipped:,} skipped; {self.num_truncated:,} of {self.num_examples:,} examples truncated."
        )

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> DataRecord:
        """Return a record as it was stored."""
        return cls(**{**facts, "sources": tuple(SourceRecord(**source) for source in facts.get("sources", ()))})

    def describe(self, num_tokens: int | None = None) -> str:
        """Say in one line what was understood.

        Args:
            num_tokens: that are trained on, if that is known to the last one. Else those of examples that are left out
                are among them, but for what is cut off.
        """
        template = _describe_template(self.template)
        skipped = f", {self.num_skipped:,} skipped" if self.num_skipped else ""
        what = f"{self.source} ({self.format}, {template})"
        if self.sources:
            what = f"{'; '.join(source.describe() for source in self.sources)}; together"
        rows, apart = f", {self.num_rows:,} rows; ", ""
        if self.is_streamed:
            rows, apart = f", read while training goes on; in its first {self.num_rows:,} rows ", ", the first"
        left_out = f", {self.num_left_out:,} of them left out," if self.num_left_out else ""
        tokens = self.num_tokens - self.num_cut_tokens if num_tokens is None else num_tokens
        before = "" if tokens == self.num_tokens else f" (of {self.num_tokens:,} that were read)"
        return (
            f"Data: {what}{rows}{self.num_examples:,} examples{left_out} "
            f"with {tokens:,} tokens to train on{before}, "
            f"{self.num_target_tokens - self.num_cut_target_tokens:,} of them to learn, "
            f"{self.num_truncated:,} truncated{skipped}; {self.num_held_out:,} held out{apart}."
        )


def make_record(data: TrainingData, counts: Counts, cut: Truncation) -> DataRecord:
    """Count what encoded examples have and lose.

    Raises:
        PatError: nothing is left to learn.
    """
    tokens, targets, left = counts.num_tokens, counts.num_targets, counts.num_left
    if not left.any():
        if counts.num_refused and not len(left):
            raise PatError(f"All examples are refused, as {counts.first_refusal}")
        if not targets.any():
            raise PatError(
                f"None of {len(targets)} examples has anything to learn: the chat template leaves out their answers; "
                "use a --chat_template_path that expresses them."
                if data.source.template == "chat"
                else f"Each of {len(targets)} examples is a single token, of which nothing is learned."
            )
        before = (tokens - targets)[targets > 0]
        shortest = f"even the shortest prompt with one response token takes {before.min() + 1}"
        if cut.keeps_end or not before.min():
            shortest = "a token that is learned and one before it take 2"
        raise PatError(
            f"All {len(before)} responses are truncated away: got max_length {cut.max_length}, but {shortest}; raise "
            f"--max_length {longest_of(tokens)}."
        )
    return DataRecord(
        source=shown_name(data.name),
        held_out_source=data.held_out_name and shown_name(data.held_out_name),
        format=data.source.format.title,
        template=data.source.template,
        fingerprint=data.source.fingerprint,
        num_rows=data.num_rows,
        num_dropped=data.num_dropped,
        unused_columns=data.source.unread,
        **sums(counts, cut, data.source.format.name),
        num_held_out_dropped=data.num_held_out_dropped,
        num_skipped=data.source.num_bad + counts.num_refused,
    )


def sums(counts: Counts, cut: Truncation, format: str) -> dict[str, Any]:
    """Return what counts of examples in a format come to, by the names of the record's fields."""
    tokens, targets, left = counts.num_tokens, counts.num_targets, counts.num_left
    return {
        "num_examples": len(left),
        "num_tokens": int(tokens.sum(dtype=np.int64)),
        "num_target_tokens": int(targets.sum(dtype=np.int64)),
        "num_truncated": int((left < targets).sum()),
        "num_cut_tokens": 0 if cut.room is None else int((tokens - cut.room).clip(0).sum(dtype=np.int64)),
        "num_cut_target_tokens": int((targets - left).sum(dtype=np.int64)),
        "num_cut_away": int(((left == 0) & (targets > 0)).sum()),
        "num_without_targets": int((targets == 0).sum()),
        "num_prompts_in_part": sum(num for names, num in counts.omitted.items() if names != ANSWER),
        "num_answers_in_part": counted(counts.omitted)[ANSWER],
        "num_double_bos": counted(counts.doubled)["bos"],
        "num_double_eos": counted(counts.doubled)["eos"],
        # A prompt of its own is meant to be context alone.
        "num_unlearned_openings": counts.num_openings if format == "messages" else 0,
    }


def combined(records: Sequence[DataRecord], shares: Sequence[float], times: Sequence[float | None]) -> DataRecord:
    """Return the record of several sources together.

    Args:
        records: of each of them.
        shares: of each in the examples that are trained on.
        times: how often each example of a source comes in an epoch, in the mean.
    """
    first = records[0]
    apart = {} if first.held_out_source is None else {"num_held_out": 0}  # of a file, which is of none of them
    sources = tuple(
        SourceRecord(
            share=share,
            times=num,
            **{f.name: getattr(record, f.name) for f in fields(SourceRecord) if hasattr(record, f.name)} | apart,
        )
        for record, share, num in zip(records, shares, times, strict=True)
    )
    names = [f.name for f in fields(DataRecord) if f.type == "int"]
    totals: dict[str, Any] = {name: sum(getattr(record, name) for record in records) for name in names}
    templates = list(dict.fromkeys(record.template for record in records))
    known = hashlib.sha256(" ".join(record.fingerprint for record in records).encode()).hexdigest()
    columns = dict.fromkeys(column for record in records for column in record.unused_columns)
    return DataRecord(
        **totals,
        source=", ".join(record.source for record in records),
        held_out_source=first.held_out_source,
        format=", ".join(dict.fromkeys(record.format for record in records)),
        template=templates[0] if len(templates) == 1 else ", ".join(template or "none" for template in templates),
        fingerprint=f"sha256:{known}",
        unused_columns=tuple(columns),
        sources=sources,
        is_streamed=first.is_streamed,
    )
