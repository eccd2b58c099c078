"""Text to compare two models on: a file of the user's, or one that comes with the package."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from pat.general_text import general_text
from pat.nll import batches_from_examples, split_text

CONTEXT = 256
MAX_TOKENS = 1024
"""Enough for a stable mean, little enough for a large model on a CPU."""


def verification_batches(
    tokenizer: Any,
    text_file: str | os.PathLike[str] | None = None,
    *,
    max_positions: int | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[dict[str, Tensor]]:
    """Return batches of one sequence each, at most 256 tokens long, of the first tokens of a text.

    Where the tokenizer starts texts with a beginning-of-sequence token, every sequence does. By default the text is
    the package's own.

    Raises:
        PatError: file missing, not UTF-8 or empty.
    """
    length = min(CONTEXT, max_positions or CONTEXT)
    rows = split_text(tokenizer, general_text(text_file), length, max_tokens)
    examples = [{"input_ids": row, "labels": row} for row in rows]
    # One row a batch: no padding, and a batch of logits over a large vocabulary stays small.
    batches = batches_from_examples(examples, batch_size=1, pad_token_id=0)
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
