"""Whether a model can learn to end its answers with the token that ends them in the data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pat.training.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SAME = 0.01
"""Two rows of the head are the same if they differ by no more than this share of a row's length."""

ROWS_AT_ONCE = 8192


@torch.no_grad()
def warn_of_end_token(vocabulary: Vocabulary, model: PreTrainedModel) -> None:
    """Warn if the head cannot tell the end token from others, as where a base was never trained on it.

    The tokens then get the same logit whatever comes before, and no adapter can change that. Nothing is said where the
    row is trained itself, and nothing can be where the head is sharded or quantised.
    """
    tokenizer = vocabulary.tokenizer
    end, head = cast(int | None, tokenizer.eos_token_id), model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if end is None or end in vocabulary.added or not isinstance(weight, Tensor) or isinstance(weight, DTensor):
        return
    if not weight.is_floating_point() or end >= len(weight):
        return
    num = sum(int(part.sum()) for part in _same(weight, end)) - 1
    if num < 1:
        return
    others = [tokenizer.convert_ids_to_tokens(token) for token in _ends(model) if token != end]
    such = f", such as {others[0]!r}, with which its configuration ends" if others else ""
    logger.warning(
        "The base was not trained to end with %r: %d other tokens have the same row in its head, so that the model "
        "will not learn to stop. Pass --eos_token with one that it knows%s.",
        tokenizer.convert_ids_to_tokens(end),
        num,
        such,
    )


def _same(weight_VC: Tensor, end: int) -> Iterator[Tensor]:
    row_C = weight_VC[end].float()
    for part_VC in weight_VC.split(ROWS_AT_ONCE):
        yield (part_VC.float() - row_C).norm(dim=1) <= SAME * row_C.norm()


def _ends(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end a text by the model's configuration."""
    found: Any = model.config.get_text_config().eos_token_id
    return [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]
