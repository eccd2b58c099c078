"""The tokens of examples, exactly as TRL 1.16's SFTTrainer makes them, in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, Features, List, Value

from pat.errors import PatError, one_line
from pat.nll import IGNORED
from pat.training.data import chat_template_of
from pat.training.messages import reads
from pat.training.sources import PLACE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEATURES = Features(
    {
        **dict.fromkeys(("input_ids", "labels"), List(Value("int32"))),  # after the cut
        **dict.fromkeys(("num_tokens", "num_targets"), Value("int64")),  # before it; targets are what is learned
        "num_left": Value("int64"),  # targets after it
        "unread": Value("string"),  # fields and options that the chat template does not mention
        "opens": Value("bool"),  # whether the first message of the prompt is an assistant's
    }
)

BATCH_SIZE = 1000
"""Examples whose texts go to the tokenizer at once, which uses every core for them."""


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

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode columns of examples, one row for each, with what `FEATURES` names.

        Raises:
            PatError: the chat template refuses an example, or the tokenizer has no end-of-sequence token.
        """
        unread = [""] * len(next(iter(batch.values())))
        opens = [False] * len(unread)
        prompts: list[list[int]] | None = None
        if "prompt" not in batch:
            full = self._ids([self._ended(text) for text in batch["text"]])
        elif isinstance(batch["prompt"][0], str):
            pairs = zip(batch["prompt"], batch["completion"], strict=True)
            full = self._ids([prompt + self._ended(completion) for prompt, completion in pairs])
            prompts = self._ids(batch["prompt"])
        else:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            chats = zip(*map(self._rendered, rows), strict=True)
            full, prompts = (self._ids(texts, add_special_tokens=False) for texts in chats)
            source = chat_template_of(self.tokenizer)
            unread = [", ".join(sorted(name for name in _names(row) if not reads(source, name))) for row in rows]
            opens = [[m["role"] for m in row["prompt"][:1]] == ["assistant"] for row in rows]
        starts = [0] * len(full)
        if prompts is not None and self.completion_only:
            starts = [_common_prefix(prompt, ids) for prompt, ids in zip(prompts, full, strict=True)]
        labels = [self.cut([IGNORED] * start + ids[start:]) for start, ids in zip(starts, full, strict=True)]
        return {
            "input_ids": [self.cut(ids) for ids in full],
            "labels": labels,
            "num_tokens": [len(ids) for ids in full],
            "num_targets": [len(ids) - start for start, ids in zip(starts, full, strict=True)],
            "num_left": [len(row) - row.count(IGNORED) for row in labels],
            "unread": unread,
            "opens": opens,
        }

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

    def _rendered(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return the text of a conversation, and that of its prompt alone."""
        options = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {}), "tokenize": False}
        render: Any = self.tokenizer.apply_chat_template
        try:
            whole = render(row["prompt"] + row["completion"], **options)
            return whole, render(row["prompt"], add_generation_prompt=True, **options)
        except Exception as error:  # whatever the expressions of a template raise
            where, reason = row.get(PLACE, "A row"), one_line(error)
            raise PatError(f"{where}: the tokenizer's chat template refuses it ({reason}); fix either.") from error


def encode(dataset: Dataset, encoder: Encoder, num_proc: int | None = None) -> Dataset:
    """Return the tokens of a dataset of examples, with the columns of `FEATURES`.

    A fast tokenizer uses every core by itself; `num_proc` processes serve a slow one, or a slow chat template.

    Raises:
        PatError: see `Encoder`.
    """
    return dataset.map(
        encoder,
        batched=True,
        batch_size=BATCH_SIZE,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=FEATURES,
        desc="Tokenizing",
    )


def learns(labels: Sequence[int]) -> bool:
    """Tell whether any of the labels counts."""
    return any(label != IGNORED for label in labels)


def _names(row: Mapping[str, Any]) -> set[str]:
    """Return what a conversation has beyond roles and texts."""
    names = {key for message in row["prompt"] + row["completion"] for key in message} - {"role", "content"}
    return names | ({"tools"} if row.get("tools") else set()) | set(row.get("chat_template_kwargs") or ())


def _common_prefix(prompt: list[int], ids: list[int]) -> int:
    if ids[: len(prompt)] == prompt:
        return len(prompt)
    return next(i for i, (a, b) in enumerate(zip([*prompt, None], [*ids, -1], strict=False)) if a != b)
