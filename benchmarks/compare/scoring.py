"""The likelihood of responses, in units that do not depend on the tokenizer of the model that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from pat.data.load import load_training_data
from pat.data.tokens import Encoder, encode, num_learned
from pat.nll import IGNORED, NLL, Example, response_nll

EVAL_BATCH_SIZE = 8


class Scorer:
    """Scores models on one file of rows: nats of all responses by the number of tokens that the base has for them.

    A model with a tokenizer of its own reads the same text with that: of a row that is too long in the base's tokens,
    as much as the base reads of it, to the last whole token. For the base's own tokenizer it is the mean over tokens.

    Args:
        path: rows of the comparison's data.
        tokenizer: of the base.
        max_length: tokens of the base that are read of a row.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.rows: Dataset = load_training_data(path, tokenizer=tokenizer, held_out=0).train
        whole = _encoded(tokenizer, self.rows)
        self._whole = [row for row in whole if num_learned(row["labels"][:max_length])]
        self._index = [index for index, row in enumerate(whole) if num_learned(row["labels"][:max_length])]
        self._base = [{name: ids[:max_length] for name, ids in row.items()} for row in self._whole]
        self.num_tokens = sum(label != IGNORED for row in self._base for label in row["labels"][1:])
        self._own: dict[int, tuple[PreTrainedTokenizerBase, list[Example]]] = {}

    def __call__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> NLL:
        """Return a model's score, of which `nll` and `num_tokens` are in tokens of the base.

        Args:
            model: a causal language model.
            tokenizer: its own.
        """
        pad = cast(int, tokenizer.pad_token_id)
        found = response_nll(model, self.examples(tokenizer), batch_size=EVAL_BATCH_SIZE, pad_token_id=pad)
        if found.num_tokens == self.num_tokens:
            return found
        share = found.num_tokens / self.num_tokens
        error = None if found.standard_error is None else found.standard_error * share
        return NLL(found.nll * share, self.num_tokens, error, found.perplexity)

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Return what a tokenizer makes of the text that the base reads."""
        if id(tokenizer) not in self._own:
            encoded = _encoded(tokenizer, self.rows)
            rows = [self._cut(tokenizer, encoded[place], n) for n, place in enumerate(self._index)]
            self._own[id(tokenizer)] = tokenizer, [row for row in rows if num_learned(row["labels"])]
        return self._own[id(tokenizer)][1]

    def _cut(self, tokenizer: PreTrainedTokenizerBase, own: Example, index: int) -> Example:
        base = self._whole[index]["input_ids"]
        if own["input_ids"] == base:
            return self._base[index]
        if len(base) <= self.max_length:
            return own
        length = _length(self.tokenizer, base[: self.max_length])
        low, high = 0, len(own["input_ids"])
        while low < high:  # the smallest number of tokens after which the next one's text would be past the end
            middle = (low + high) // 2
            if _length(tokenizer, own["input_ids"][: middle + 1]) > length:
                high = middle
            else:
                low = middle + 1
        while low and _length(tokenizer, own["input_ids"][: low - 1]) == length:  # the end of the response adds no text
            low -= 1
        return {name: ids[:low] for name, ids in own.items()}


def _length(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    return len(cast(str, tokenizer.decode(list(ids), skip_special_tokens=True)))


def _encoded(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> list[dict[str, Any]]:
    tokens = encode(rows, Encoder(tokenizer)).select_columns(["input_ids", "labels"])
    return cast(list[dict[str, Any]], tokens.to_list())
