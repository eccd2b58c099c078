"""Whether a model can learn to end its answers with the token that ends them in the data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pat.nll import IGNORED, Example
from pat.training.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SAME = 0.01
"""Two rows of the head are the same if they differ by no more than this share of a row's length."""

ROWS_AT_ONCE = 8192


def end_of(examples: Iterable[Example]) -> int | None:
    """Return the token with which most of some examples end what is to be learned; None if there is nothing."""
    ends = Counter(example["labels"][-1] for example in examples if len(example["labels"]))
    ends.pop(IGNORED, None)
    return ends.most_common(1)[0][0] if ends else None


@torch.no_grad()
def warn_of_end_token(vocabulary: Vocabulary, model: PreTrainedModel, end: int | None, trained: Sequence[str]) -> None:
    """Warn if the head cannot tell an end token from others, as where a base was never trained on it.

    The tokens then get the same logit whatever comes before, and no adapter can change that. Nothing is said where the
    row is trained itself, or is quantised.

    Args:
        vocabulary: of the run.
        model: the base.
        end: the token that ends answers in the data.
        trained: names, or ends of names, of modules that are trained beside the adapter.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is head or module is embedding]
    weight = getattr(head, "weight", None)
    if end is None or end in vocabulary.added or any(name.endswith(tuple(trained)) for name in names):
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or end >= len(weight):
        return
    num = sum(int(part.sum()) for part in _same(weight, end)) - 1
    if num < 1:
        return
    tokenizer = vocabulary.tokenizer
    advice = "Train its row, too (--lora_modules_to_save)"
    if end == tokenizer.eos_token_id:
        advice = "Pass --eos_token with one that it knows"
        if others := [token for token in _ends(model) if token != end]:
            advice += f", such as {tokenizer.convert_ids_to_tokens(others[0])!r}, with which its configuration ends"
    logger.warning(
        "The base was not trained to end with %r: %d other token%s the same row in its head, so that the model will "
        "not learn to stop. %s.",
        tokenizer.convert_ids_to_tokens(end),
        num,
        "s have" if num > 1 else " has",
        advice,
    )


def _same(weight_VC: Tensor, end: int) -> Iterator[Tensor]:
    row_C = weight_VC[end].float()
    for part_VC in weight_VC.split(ROWS_AT_ONCE):
        yield (part_VC.float() - row_C).norm(dim=1) <= SAME * row_C.norm()


def _ends(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end a text by the model's configuration."""
    found = cast(object, model.config.get_text_config().eos_token_id)
    return [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]
