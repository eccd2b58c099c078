"""The tokens of examples, exactly as TRL 1.16's SFTTrainer makes them, in batches."""

from __future__ import annotations

import gc
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, Features, List, Value

from pat.data.conversion import PLACE, ROW
from pat.data.end_token import EndFinder
from pat.data.load import chat_template_of
from pat.data.messages import reads
from pat.data.rendered import ANSWER, Rendered, left_out, render
from pat.data.tables import ROWS_AT_ONCE, cache_folder, cached_table, digest
from pat.errors import PatError, one_line
from pat.nll import IGNORED
from pat.report.progress import bars_of_datasets, phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED_ON = ["input_ids", "labels"]
"""Columns of `FEATURES` that a trainer takes."""

FEATURES = Features(
    {
        **dict.fromkeys(TRAINED_ON, List(Value("int32"))),  # after the cut
        **dict.fromkeys(("num_tokens", "num_targets"), Value("int64")),  # before it; targets are what is learned
        "num_left": Value("int64"),  # targets after it
        "end": Value("int64"),  # the token that ends what is learned, before the cut; see `EndFinder`
        "unread": Value("string"),  # fields and options that the chat template does not mention
        "omitted": Value("string"),  # what the chat template leaves out, see `left_out`
        "doubled": Value("string"),  # special tokens that come twice at the ends: bos, eos
        "opens": Value("bool"),  # whether the first message of the prompt is an assistant's
        "misfit": Value("bool"),  # whether strings have no gap between them, or a template asks as it does not write
        "refusal": Value("string"),  # why there are no tokens, if the example was skipped
        ROW: Value("int64"),
    }
)

ROWS_FOR_A_PROCESS = 20_000
"""Rows for which a process more pays."""


@dataclass(frozen=True)
class Truncation:
    """SFTTrainer's arguments that say how sequences are made to fit."""

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    packing: bool = False
    packing_strategy: str = "bfd"

    @property
    def room(self) -> int | None:
        """Number of tokens that are kept of a sequence; None if all are kept, even if in several sequences."""
        return None if self.packing and self.packing_strategy != "bfd" else self.max_length

    @property
    def keeps_end(self) -> bool:
        """Whether sequences lose their beginning instead of their end."""
        return self.truncation_mode == "keep_end" and not self.packing

    def __call__(self, values: list[int]) -> list[int]:
        """Return what is left of a sequence."""
        if self.room is None:
            return values
        return values[-self.room :] if self.keeps_end else values[: self.room]

    def pieces(self, values: list[int]) -> list[list[int]]:
        """Return the sequences that one becomes, each of at most `max_length`."""
        if self.room is not None or self.max_length is None:
            return [self(values)]
        return [values[at : at + self.max_length] for at in range(0, len(values), self.max_length)]


@dataclass(frozen=True)
class Encoder:
    """Turns batches of examples into `input_ids` and `labels` (-100 where nothing is learned).

    The end-of-sequence token is appended to plain strings; in conversations that is up to the chat template. The
    completion starts where the tokens of the prompt and of prompt + completion diverge: before the prompt's end if
    tokens merge across it.
    """

    tokenizer: PreTrainedTokenizerBase
    cut: Truncation = Truncation()
    completion_only: bool = True
    skips: bool = False
    """Whether an example that the chat template refuses comes out without tokens."""

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode columns of examples, one row for each, with what `FEATURES` names.

        Raises:
            PatError: the chat template refuses an example, or the tokenizer has no end-of-sequence token.
        """
        unread = [""] * len(next(iter(batch.values())))
        omitted: list[set[str]] = [set()] * len(unread)
        opens, misfit = [False] * len(unread), [False] * len(unread)
        refusals = [""] * len(unread)
        prompts: list[list[int]] | None = None
        if "prompt" not in batch:
            full = self._ids([self._ended(text) for text in batch["text"]])
        elif isinstance(batch["prompt"][0], str):
            pairs = zip(batch["prompt"], batch["completion"], strict=True)
            full = self._ids([prompt + self._ended(completion) for prompt, completion in pairs])
            prompts = self._ids(batch["prompt"])
            ends = tuple(self.tokenizer.get_added_vocab())
            pairs = zip(batch["prompt"], batch["completion"], strict=True)
            misfit = [not (p[-1:].isspace() or c[:1].isspace() or p.endswith(ends)) for p, c in pairs]
        else:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            source = chat_template_of(self.tokenizer)
            rendered = [self._rendered(row, source) for row in rows]
            refusals = [found.refusal for found in rendered]
            full = self._ids([found.whole for found in rendered], add_special_tokens=False)
            prompts = self._ids([found.prompt for found in rendered], add_special_tokens=False)
            unread = [", ".join(sorted(name for name in _names(row) if not reads(source, name))) for row in rows]
            omitted = [
                set() if found.refusal else left_out(found.row, found.whole, found.prompt, source) for found in rendered
            ]
            misfit = [not found.whole.startswith(found.prompt) for found in rendered]
            opens = [self.completion_only and [m["role"] for m in row["prompt"][:1]] == ["assistant"] for row in rows]
        starts = [0] * len(full)
        if prompts is not None and self.completion_only:
            starts = [_common_prefix(prompt, ids) for prompt, ids in zip(prompts, full, strict=True)]
        find_end = EndFinder(self.tokenizer)
        whole = [[IGNORED] * start + ids[start:] for start, ids in zip(starts, full, strict=True)]
        labels = [self.cut(row) for row in whole]
        return {
            "input_ids": [self.cut(ids) for ids in full],
            "labels": labels,
            "num_tokens": [len(ids) for ids in full],
            "num_targets": [num_learned(row) for row in whole],
            "num_left": [num_learned(row) for row in labels],
            "end": [find_end(ids[start:]) for start, ids in zip(starts, full, strict=True)],
            "unread": unread,
            # That nothing is left of an answer is counted where there is nothing to learn.
            "omitted": [
                ", ".join(sorted(names if start < len(ids) else names - {ANSWER}))
                for names, start, ids in zip(omitted, starts, full, strict=True)
            ],
            "doubled": [find_end.doubled(ids) for ids in full],
            "opens": opens,
            "misfit": misfit,
            "refusal": refusals,
            ROW: batch.get(ROW, [0] * len(full)),
        }

    def parts(self) -> tuple[Any, ...]:
        """Return what decides on the tokens of an example, so far as it can be told."""
        tokenizer, how = self.tokenizer, (str(self.cut), self.completion_only, self.skips)
        # What a slow tokenizer does is not all in its vocabulary.
        known = cast(Any, tokenizer).backend_tokenizer.to_str() if tokenizer.is_fast else uuid.uuid4().hex
        template = chat_template_of(tokenizer)
        today = date.today().isoformat() if "strftime_now" in (template or "") else ""
        # A template may mention any special token.
        specials = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
        return type(tokenizer).__name__, known, template, today, specials, *how

    def _ids(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        # verbose=False: a text longer than the model's window is no reason to warn, it is cut.
        call = partial(cast(Any, self.tokenizer), add_special_tokens=add_special_tokens, verbose=False)
        if not self.tokenizer.is_fast:
            return cast(list[list[int]], call(text=list(texts))["input_ids"])
        call(text="")  # turns off, as every call does, truncation and padding that the tokenizer was saved with
        # The same encoding without offsets, which take a third of the time and are not needed.
        encodings = cast(Any, self.tokenizer).backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def _ended(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        if not isinstance(eos, str):
            raise PatError("The tokenizer has no end-of-sequence token to end responses with; pass --eos_token.")
        return text if text.endswith(eos) else text + eos

    def _rendered(self, row: Mapping[str, Any], source: str) -> Rendered:
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {}), "tokenize": False}
        try:
            return render(row, partial(cast(Any, self.tokenizer).apply_chat_template, **options), source)
        except Exception as error:  # whatever the expressions of a template raise
            where, reason = row.get(PLACE, "A row"), one_line(error)
            refusal = f"{where}: the tokenizer's chat template refuses it ({reason}); fix either."
            if not self.skips:
                raise PatError(refusal, of_row=True) from error
            return Rendered(row, "", "", refusal)


def encode(
    dataset: Dataset, encoder: Encoder, num_proc: int | None = None, *, key: str | None = None, shown: bool = False
) -> Dataset:
    """Return the tokens of a dataset of examples, with the columns of `FEATURES`.

    Args:
        dataset: of examples.
        encoder: makes tokens of them.
        num_proc: number of processes; by default as many as there are cores, if there are rows enough.
        key: digest of everything that the examples are made of; with it the tokens are a table of the cache, and made
            once. Without it they are in memory.
        shown: whether progress is shown.

    Raises:
        PatError: see `Encoder`.
    """
    if num_proc is None:
        num_proc = min(_num_cores(), len(dataset) // ROWS_FOR_A_PROCESS) or None
    # Several processes of several threads each would get into each other's way.
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    forks = num_proc is not None and num_proc > 1
    if forks:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # A collection in a process would touch, and so copy, all memory that it shares with this one.
        gc.collect()
        gc.freeze()

    def run(**options: Any) -> Dataset:
        with TemporaryDirectory() as folder:
            counter = Path(folder) / "rows"
            counter.touch()
            with (
                phase("Tokenizing", "examples", total=len(dataset), shown=shown, count=lambda: counter.stat().st_size),
                bars_of_datasets(shown=False),
            ):
                return dataset.map(
                    partial(_counted, encoder, str(counter)),
                    batched=True,
                    batch_size=ROWS_AT_ONCE,
                    num_proc=num_proc,
                    remove_columns=dataset.column_names,
                    features=FEATURES,
                    load_from_cache_file=False,
                    **options,
                )

    def make(folder: Path) -> dict[str, Any]:
        run(cache_file_name=str(folder / "tokens.arrow"), new_fingerprint=key)
        made.append(folder)
        return {}

    made: list[Path] = []
    try:
        if key is None:
            return run(keep_in_memory=True)
        table = cached_table(digest(key, encoder.parts()), make)[0]
        if shown:
            where = "kept in" if made else "taken from"
            print(f"The tokens of {len(table):,} examples are {where} {cache_folder()}.", file=sys.stderr)
        return table
    finally:
        if forks:
            gc.unfreeze()
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


def _counted(encoder: Encoder, counter: str, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Encode a batch, and let a file grow by a byte for each example of it, whichever process this is."""
    encoded = encoder(batch)
    with open(counter, "ab") as file:
        file.write(bytes(len(encoded[ROW])))
    return encoded


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_learned(labels: Sequence[int]) -> int:
    """Return the number of labels that count; none if that is the first alone, which nothing comes before."""
    num = len(labels) - labels.count(IGNORED)
    return 0 if num == 1 and labels[0] != IGNORED else num


def _names(row: Mapping[str, Any]) -> set[str]:
    """Return what a conversation has beyond roles and texts."""
    names = {key for message in row["prompt"] + row["completion"] for key in message} - {"role", "content"}
    return names | ({"tools"} if row.get("tools") else set()) | set(row.get("chat_template_kwargs") or ())


def _common_prefix(prompt: list[int], ids: list[int]) -> int:
    if ids[: len(prompt)] == prompt:
        return len(prompt)
    return next(i for i, (a, b) in enumerate(zip([*prompt, None], [*ids, -1], strict=False)) if a != b)
