"""Text to compare two models on: a file of the user's, or one that comes with the package."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from pat.errors import PatError
from pat.general_text import general_text
from pat.nll import batches_from_examples, split_text

CONTEXT = 256
MAX_TOKENS = 1024
"""Enough for a stable mean, little enough for a large model on a CPU."""


def verification_batches(
    tokenizer: Any,
    text_file: str | os.PathLike[str] | None = None,
    *,
    num_embeddings: int | None = None,
    max_positions: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[dict[str, Tensor]]:
    """Return batches of one sequence each, at most 256 tokens long, of the first tokens of a text.

    Where the tokenizer starts texts with a beginning-of-sequence token, every sequence does. By default the text is
    the package's own, without those of its tokens that the model has no embedding for.

    Args:
        tokenizer: of the model.
        text_file: the text, a file.
        num_embeddings: number of tokens that the model has embeddings for; by default for all of the tokenizer.
        max_positions: number of tokens that the model reads at most.
        max_tokens: number of tokens of the text that are taken.

    Raises:
        PatError: file missing, not UTF-8 or empty, or with a token that the model has no embedding for.
    """
    length = min(CONTEXT, max_positions or CONTEXT)
    rows = split_text(tokenizer, general_text(text_file), length, max_tokens)
    if num_embeddings is not None and (largest := max(map(max, rows))) >= num_embeddings:
        if text_file is not None:
            raise PatError(
                f"{text_file}: holds the token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), but the "
                f"model has embeddings for {num_embeddings} tokens; give another text."
            )
        rows = [known for row in rows if len(known := [token for token in row if token < num_embeddings]) > 1]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    # One row a batch: no padding, and a batch of logits over a large vocabulary stays small.
    batches = batches_from_examples(examples, batch_size=1, pad_token_id=0)
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
