"""Tokens of a dataset's examples, as the product makes them."""

from __future__ import annotations

from typing import cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pat.data.tokens import Encoder, Truncation, encode, num_learned
from pat.nll import Example


def tokenize_examples(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, max_length: int | None) -> list[Example]:
    """Return the `input_ids` and `labels` of all examples, cut at their end; those without a label left are dropped.

    Raises:
        PatError: see `encode`.
    """
    rows = encode(dataset, Encoder(tokenizer, Truncation(max_length))).select_columns(["input_ids", "labels"]).to_list()
    return [cast(Example, row) for row in rows if max_length is None or num_learned(row["labels"])]
