"""What base and small model answer to the same held-out prompts, taken while they are in memory anyway."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from pat.errors import one_line
from pat.nll import IGNORED, Example, evaluating
from pat.report.progress import Phase, phase
from pat.training.inputs.prepare import Prepared

logger = logging.getLogger(__name__)

NUM_PROMPTS = 2
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """A prompt, the greedy answers of both models, and the answer of the data."""

    prompt: str
    base: str
    small: str
    reference: str | None = None
    """Answer of the held-out row; None for a prompt that is from no row."""


def greedy_answers(model: PreTrainedModel, data: Prepared) -> list[tuple[str, str]]:
    """Return the first held-out prompts with a model's greedy answers.

    There are none for texts without prompts. Where the vocabulary is trimmed, the base's has to be as well. A
    model that cannot generate is a warning, because nothing else in a run needs it to.
    """
    tokenizer = data.vocabulary.tokenizer
    try:
        prompts = [prompt for prompt, _ in _prompts(data.held_out)]
        with phase("Answering held-out prompts", "tokens", total=MAX_NEW_TOKENS * len(prompts)) as progress:
            answers = []
            for number, prompt in enumerate(prompts):
                progress.done = MAX_NEW_TOKENS * number  # an answer may have ended early
                answers.append(_answer(model, tokenizer, prompt, data.ends, progress))
            return [(cast(str, tokenizer.decode(prompt)), text) for prompt, text in zip(prompts, answers, strict=True)]
    except Exception as error:  # whatever a family's own generation raises; training and merge do not need it
        logger.warning("No sample answers were taken (%s: %s).", type(error).__name__, one_line(error))
        return []


def paired(base: Sequence[Sequence[str]], small: Sequence[Sequence[str]], data: Prepared) -> list[Sample]:
    """Return the answers of two models to the same prompts beside those of the data; none if a model has none."""
    tokenizer = data.vocabulary.tokenizer
    given = [
        cast(str, tokenizer.decode(answer, skip_special_tokens=True)).strip() for _, answer in _prompts(data.held_out)
    ]
    return [
        Sample(prompt, first, second, reference)
        for (prompt, first), (_, second), reference in zip(base, small, given, strict=False)
    ]


def _prompts(examples: Sequence[Example]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompt and answer, as tokens, of the first held-out examples whose prompts differ.

    The answer is all that is learned, its end token included.
    """
    seen: list[list[int]] = []
    for example in examples:
        learned = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
        prompt = list(example["input_ids"][: learned[0]]) if learned else []
        if len(seen) < NUM_PROMPTS and len(prompt) > 1 and prompt not in seen:
            seen.append(prompt)
            yield prompt, [example["input_ids"][place] for place in learned]


class _Counting(BaseStreamer):
    """Counts the tokens that are written. What it is handed first is the prompt."""

    def __init__(self, progress: Phase) -> None:
        self.progress = progress
        progress.done -= 1

    def put(self, value: torch.Tensor) -> None:
        self.progress.done += 1

    def end(self) -> None:
        """Nothing is left to be shown."""


@torch.no_grad()
def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    ends: Sequence[int],
    progress: Phase,
) -> str:
    ids = torch.tensor([prompt], device=model.device)
    ends = [*ends, *(() if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)])]
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    with evaluating(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy,
            streamer=_Counting(progress),
        )
    answer = cast(torch.Tensor, output)[0, len(prompt) :]
    return cast(str, tokenizer.decode(answer, skip_special_tokens=True)).strip()
