"""The tokens with which answers end in the data, and whether a model can learn to stop there."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pat.loading import TokenSetup
from pat.loading.tokenizer import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pat.data.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

SAME = 0.01
"""Two rows of the head are the same if they differ by no more than this share of a row's length."""

ROWS_AT_ONCE = 8192
"""Rows of the head that are compared at once."""

NO_END = -1
"""Stands for the end of an answer after which no special token comes."""

SHARE_OF_ENDS = 0.1
"""A token ends answers if it does so in this share of a source: calls of tools may end otherwise than texts."""


class EndFinder:
    """Finds the token that ends what is learned: a special one, or an added one that the chat template names.

    Blank tokens may follow it, as in ChatML.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = str(tokenizer.chat_template or "")  # ordinary words may be added to a vocabulary, too
        added = tokenizer.added_tokens_decoder.items()
        self.marks = {token for token, mark in added if mark.special or mark.content in template}
        self.marks |= set(tokenizer.all_special_ids)
        self.blank: dict[int, bool] = {}

    def __call__(self, learned: Sequence[int]) -> int | None:
        """Return the token, `NO_END` if there is none, and None if nothing is learned."""
        for token in self._not_blank(reversed(learned)):
            return token if token in self.marks else NO_END
        return NO_END if len(learned) else None

    def doubled(self, ids: Sequence[int]) -> str:
        """Name the special tokens, bos and eos, that come twice: a text had one to which another was added.

        Blank tokens may stand between them, and behind them.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        sides = {"bos": (bos, ids), "eos": (eos, reversed(ids))}
        found = {name: (token, list(islice(self._not_blank(side), 2))) for name, (token, side) in sides.items()}
        return ", ".join(name for name, (token, two) in found.items() if two == [token, token])

    def _not_blank(self, ids: Iterable[int]) -> Iterator[int]:
        for token in ids:
            if token not in self.blank:  # line breaks are added tokens, too, in Gemma's tokenizers
                self.blank[token] = not cast(str, self.tokenizer.decode([token])).strip()
            if not self.blank[token]:
                yield token


def ends_of(counts: Iterable[Counter[int]]) -> list[int]:
    """Return the tokens that end answers, the most frequent first, of counts of the ends of each source's examples."""
    found: Counter[int] = Counter()
    for ends in counts:
        found.update({end: num for end, num in ends.items() if num >= SHARE_OF_ENDS * ends.total()})
    del found[NO_END]
    return [end for end, _ in found.most_common()]


def taught_to_stop(tokens: TokenSetup, ends: Sequence[int]) -> TokenSetup:
    """Return the tokens to write, with all that end answers in the data; those that were not among them are said."""
    known, new = tokens.ends, [end for end in ends if end not in tokens.ends]
    if not new:
        return tokens
    names = tokens.tokenizer.convert_ids_to_tokens
    logger.warning(
        "Answers in the data end with %s, while tokenizer and base end a text with %s; generation_config.json names "
        "all of them, so that generation stops at each.",
        " or ".join(repr(names(end)) for end in new),
        " or ".join(repr(names(end)) for end in known) or "nothing",
    )
    return tokens.ending_with(new)


@torch.no_grad()
def warn_of_end_token(vocabulary: Vocabulary, model: PreTrainedModel, end: int, trained: Sequence[str]) -> None:
    """Warn if the head cannot tell an end token from others, as where a base was never trained on it.

    The tokens then get the same logit whatever comes before, and no adapter can change that. Nothing is said where the
    row is trained itself, or is quantised.

    Args:
        vocabulary: of the run.
        model: the base.
        end: a token that ends answers in the data.
        trained: names, or ends of names, of modules that are trained beside the adapter.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is head or module is embedding]
    weight = getattr(head, "weight", None)
    if end in vocabulary.added or any(name.endswith(tuple(trained)) for name in names):
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
        if others := [token for token in end_tokens(model.config.get_text_config()) if token != end]:
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
