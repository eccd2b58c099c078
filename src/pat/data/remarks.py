"""A line for everything of the data that is left out, cut or doubtful."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset

from pat.data.counts import Counts, counted, longest_of
from pat.data.end_token import NO_END
from pat.data.formats import listed
from pat.data.load import TrainingData
from pat.data.record import DataRecord
from pat.data.rendered import ANSWER
from pat.data.tables import batches_of
from pat.data.tokens import Truncation, num_learned
from pat.nll import max_positions


def remarks(
    record: DataRecord, data: TrainingData, counts: Counts, cut: Truncation, *, teaches: bool = True
) -> Iterator[str]:
    """Yield a line for everything of the data that is left out, cut, or not as it may be meant.

    Args:
        record: of the data.
        data: the data.
        counts: of its examples.
        cut: how they were made to fit.
        teaches: whether a model is trained on them, and not only measured.
    """
    all_examples = f"of {record.num_examples:,} examples"
    if record.num_skipped:
        first = data.source.first_bad or counts.first_refusal
        yield f"{record.num_skipped:,} rows cannot be used and are skipped, as --on_bad_row says; the first is {first}"
    if data.num_held_out_bad:
        first = f"; the first is {data.first_held_out_bad}" if data.first_held_out_bad else "."
        yield f"{data.num_held_out_bad:,} held-out rows cannot be used and are skipped, as --on_bad_row says{first}"
    if record.num_dropped:
        have = "has no response and is" if record.num_dropped == 1 else "have no response and are"
        yield f"{record.num_dropped:,} of {record.num_rows:,} rows {have} left out."
    if record.num_held_out_dropped:
        rows = "row has no response and is" if record.num_held_out_dropped == 1 else "rows have no response and are"
        yield f"{record.num_held_out_dropped:,} held-out {rows} left out."
    if record.num_unlearned_openings:
        yield (
            f"In {record.num_unlearned_openings:,} rows the conversation opens with a message of the assistant; it is "
            "read and not learned, as nothing comes before it."
        )
    if record.unused_columns:
        yield f"These columns are not read: {listed(record.unused_columns)}."
    if counts.num_unread:
        names = ", ".join(counts.unread)
        yield (
            f"The chat template does not mention {names}, so what {counts.num_unread:,} {all_examples} say there "
            "is left out; use a --chat_template_path that expresses it."
        )
    if counts.omitted:
        found = counted(counts.omitted)
        parts = [f"parts of the answer in {found.pop(ANSWER):,}"] if ANSWER in found else []
        roles = [f"what messages of role {role} say in {num:,}" for role, num in sorted(found.items())]
        yield (
            f"The chat template leaves out {' and '.join([*roles, *parts])} {all_examples}; use a --chat_template_path "
            "that expresses them, or leave them out of the data."
        )
    if record.num_without_targets and data.source.template != "chat":
        yield f"{record.num_without_targets:,} {all_examples} are a single token, and do not count."
    elif record.num_without_targets:
        yield (
            f"{record.num_without_targets:,} {all_examples} have nothing to learn, since the chat template leaves out "
            "their answer, and do not count; use a --chat_template_path that expresses it."
        )
    adds = "chat template" if data.source.template == "chat" else "tokenizer"
    if record.num_double_bos:
        yield (
            f"{record.num_double_bos:,} {all_examples} begin with two beginning-of-sequence tokens: the {adds} adds "
            "one to that of the text; leave it out of the data."
        )
    if record.num_double_eos:
        yield (
            f"{record.num_double_eos:,} {all_examples} end with two end-of-sequence tokens: the {adds} adds one to "
            "that of the response; leave it out of the data"
            + (", or have it add none (add_eos_token in its tokenizer_config.json)." if adds == "tokenizer" else ".")
        )
    if teaches and data.source.template == "chat" and (num_endless := counts.ends[NO_END]):
        yield (
            f"Under the chat template {num_endless:,} {all_examples} end their answer without a special token, and do "
            "not teach the model to stop; use a --chat_template_path that ends answers with the end token."
        )
    if data.source.template == "chat" and counts.num_misfits:
        yield (
            f"In {counts.num_misfits:,} {all_examples} the prompt with which the chat template asks for an answer "
            "(add_generation_prompt) is not what it writes before that answer, as where it opens thoughts that the "
            "answer has not: the model will be asked otherwise than it learns; use a --chat_template_path that does "
            "both alike."
        )
    is_plain = data.source.template is None and data.source.format.name == "prompt-completion"
    if is_plain and 2 * counts.num_misfits > record.num_examples:
        yield (
            f"In {counts.num_misfits:,} {all_examples} the completion follows its prompt without a space, "
            "a line break or a template between them; end prompts with one, or use --template chat or alpaca."
        )
    if cut.room is not None and record.num_cut_tokens:
        text, num_longer = record.format == "text", int((counts.num_tokens > cut.room).sum())
        yield (
            f"{num_longer:,} {all_examples} are cut at --max_length {cut.max_length}: {record.num_cut_tokens:,} of "
            f"{record.num_tokens:,} tokens are dropped, {record.num_cut_target_tokens:,} of them to learn; raise it "
            f"{longest_of(counts.num_tokens)}"
            + (
                ", or drop none by --packing true --packing_strategy wrapped."
                if text and not record.is_streamed
                else "."
            )
        )
    if record.num_truncated and record.format != "text" and not cut.keeps_end:
        yield f"{record.num_truncated:,} {all_examples} lose the end of their response, so that it never stops."
    if record.num_cut_away:
        cut_away = counts.num_tokens[(counts.num_left == 0) & (counts.num_targets > 0)]
        yield (
            f"{record.num_cut_away:,} {all_examples} have no response left within --max_length {cut.max_length} and do "
            f"not count; raise it {longest_of(cut_away)}, or keep responses by --truncation_mode keep_end."
        )


def held_out_remarks(record: DataRecord, rows: Sequence[Mapping[str, Any]], cut: Truncation) -> Iterator[str]:
    """Yield a line if held-out examples, given whole, are cut."""
    num_longer = 0 if cut.room is None else sum(len(row["input_ids"]) > cut.room for row in rows)
    if num_longer:
        yield (
            f"{num_longer:,} of {len(rows):,} held-out examples are cut likewise; {record.num_held_out:,} have a "
            "response left to be measured."
        )


def position_remarks(counts: Sequence[Counts], cut: Truncation, config: Any) -> Iterator[str]:
    """Yield a line if there are sequences longer than those that the base model was made for.

    Args:
        counts: of the examples of each source.
        cut: how sequences are made to fit.
        config: of the base.
    """
    positions, longest = max_positions(config), cut.max_length or math.inf
    if positions is None or longest <= positions:
        return
    # Stretched positions reach further than some configurations say; there may be several, by the kind of layer.
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        reach = (part.get("factor") or 1) * (part.get("original_max_position_embeddings") or positions)
        positions = max(positions, int(reach))
    lengths = np.concatenate([found.num_tokens for found in counts])
    if cut.packing and cut.packing_strategy == "wrapped":  # texts that follow each other fill rows
        is_longer, what = lengths.sum(dtype=np.int64) > positions, "Packed rows"
    else:
        num_longer = int((lengths > positions).sum())
        is_longer, what = num_longer > 0, f"{num_longer:,} of {len(lengths):,} examples"
        longest = min(int(lengths.max()), longest)
    if is_longer:
        yield (
            f"{what} are longer than the {positions:,} positions that the base was made for (max_position_embeddings), "
            f"up to {longest:,} tokens; pass a --max_length of at most {positions}."
        )


def overlap_remarks(apart: Sequence[Mapping[str, Any]], trained: Sequence[Dataset], cut: Truncation) -> Iterator[str]:
    """Yield a line if held-out examples of a source of their own are among those that are trained on.

    Args:
        apart: held-out examples, given whole.
        trained: tables of tokens of all sources, whole ones of which no rows are selected.
        cut: how sequences of these tables were made to fit.
    """
    measured = [row for row in apart if cut.max_length is None or cut.packing or num_learned(cut(list(row["labels"])))]
    keys = [np.array(cut(list(row["input_ids"])), np.int32).tobytes() for row in measured]
    wanted, found = set(keys), set[bytes]()
    for rows in trained:
        for batch in batches_of(rows, ["input_ids"]):
            for lists in batch["input_ids"].chunks:
                tokens = lists.flatten().to_numpy()
                ends = np.cumsum(pyarrow.compute.list_value_length(lists).to_numpy())
                pieces = (part.tobytes() for part in np.split(tokens, ends[:-1]))
                found.update(piece for piece in pieces if piece in wanted)
    if num := sum(key in found for key in keys):
        yield (
            f"{num:,} of {len(keys):,} held-out examples are trained on as well, so that held-out figures are "
            f"{'' if num == len(keys) else 'in part '}those of training rows; hold out rows that are not trained on."
        )
