"""How a model answers a question, as plainly as it can be written: one question at a time, no batch, no cache.

Nothing of `pat.evaluation.tasks` is used: the wording, the truncation and the scoring are written down again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_NEW_TOKENS = 5

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
    "Answer the question by replying the index of the correct choice, which should be one of {letters}.\n"
    "{question}\n"
    "The index of the answer is\n\n"
    "### Response:\n"
)


@dataclass(frozen=True)
class LetterAnswer:
    """The letter that counts, what was generated until then, and how close another token came on the way."""

    letter: str | None
    text: str
    gap: float
    """Smallest difference between the two largest logits of a step."""


def plain_letter(model: Any, tokenizer: Any, row: Mapping[str, Any], max_positions: int) -> LetterAnswer:
    """Answer under the letter protocol."""
    letters = "ABCDEFGH"[: len(row["choices"])]
    quoted = str(list(letters)).strip("[]")
    ids = tokenizer(PROMPT.format(letters=quoted, question=row["prompt"]))["input_ids"]
    ids = ids[-(max_positions - MAX_NEW_TOKENS) :]
    own_stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own_stop if isinstance(own_stop, list) else [own_stop])}
    new: list[int] = []
    gap = float("inf")
    while len(new) < MAX_NEW_TOKENS:
        top = _logits(model, ids + new)[-1].topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        if int(top.indices[0]) in stops:
            break
        new.append(int(top.indices[0]))
        text = tokenizer.decode(new, skip_special_tokens=True)
        for character in text:
            if character in letters:
                return LetterAnswer(character, text, gap)
    return LetterAnswer(None, tokenizer.decode(new, skip_special_tokens=True), gap)


def plain_likelihoods(model: Any, tokenizer: Any, row: Mapping[str, Any], max_positions: int) -> list[float]:
    """Log-likelihood of each choice's text after the question."""
    context = row["stem"].replace(" Answer the question by replying A, B, C or D.", "") + "\nAnswer:"
    num_context = len(tokenizer(context)["input_ids"])
    likelihoods = []
    for choice in row["choices"]:
        ids = tokenizer(context + " " + choice)["input_ids"]
        targets = ids[num_context:]
        read = ids[-(max_positions + 1) :][:-1]
        log_probabilities = _logits(model, read)[-len(targets) :].log_softmax(-1)
        picked = log_probabilities[torch.arange(len(targets)), torch.tensor(targets)]
        likelihoods.append(float(picked.sum()))
    return likelihoods


def best(values: list[float]) -> tuple[int, float]:
    """Index of the largest value, the first of equals, and how far the second largest is behind it."""
    index = max(range(len(values)), key=values.__getitem__)
    return index, values[index] - max(value for i, value in enumerate(values) if i != index)


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> Tensor:
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    logits: Tensor = output.logits[0].float().cpu()
    return logits
