"""A loaded model as a language model of lm-evaluation-harness.

It derives from the harness's `TemplateLM`, not from its `HFLM`: that one's constructor wants more of a model than a
causal language model has to have (`device`, `tie_weights`). Tokenisation and truncation are those of `HFLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from torch import nn
from transformers import PreTrainedTokenizerBase

from pat.errors import PatError
from pat.evaluation.tasks.batched import BatchedModel, Scored
from pat.evaluation.tasks.prefixes import Item
from pat.nll import Progress


class BatchedLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """The requests of lm-evaluation-harness, answered in sorted batches that share what their prompts share.

    Args:
        model: see `BatchedModel`; in eval mode, with a `config`.
        is_decided: called with a task's document and the text generated so far; True ends the generation.
        share: False computes every request from its first token.
    """

    backend = "causal"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        is_decided: Callable[[Mapping[str, Any], str], bool] | None = None,
        progress: Progress | None = None,
        share: bool = True,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        pad = tokenizer.pad_token_id
        self.batched = BatchedModel(model, pad_token_id=0 if pad is None else pad, batch_size=batch_size, share=share)
        self._device = self.batched.device
        self.max_length: int = resolve_max_length(model.config, tokenizer)
        self.stop_ids = _stop_ids(model, tokenizer)
        self.is_decided = is_decided
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenise as `HFLM` does: the tokenizer's special tokens, but no second beginning-of-sequence token."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, verbose=False, **options))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        num_scored: dict[tuple[int, ...], int] = {}  # choices of one token often share all that is computed
        inputs = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise PatError(
                    f"Got a choice of {len(continuation)} tokens; expected 1 to {self.max_length}, which is what the "
                    "model reads."
                )
            # The last token is only predicted; what is too long loses its beginning.
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            num_scored[tokens] = max(num_scored.get(tokens, 0), len(continuation))
            inputs.append((tokens, tuple(continuation)))
        items = [Item(tokens, count) for tokens, count in num_scored.items()]
        numbers = {item.tokens: number for number, item in enumerate(items)}
        scored = [Scored(numbers[tokens], targets) for tokens, targets in inputs]
        return self.batched.score(items, scored, self.progress)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, cut at the stop sequences and ended early where they are decided."""
        answers: list[str | None] = [None] * len(requests)
        by_length: dict[int, list[int]] = {}
        stops: list[list[str]] = []
        for number, request in enumerate(requests):
            options: Any = normalize_gen_kwargs(request.args[1])  # the harness's names and defaults
            if options["do_sample"]:
                raise PatError(f"Got the generation options {request.args[1]}; expected greedy ones: do_sample=False.")
            stops.append([stop for stop in options["until"] if stop])
            by_length.setdefault(options["max_gen_toks"], []).append(number)
        for max_new_tokens, numbers in by_length.items():
            room = self.max_length - max_new_tokens
            if room < 1:
                raise PatError(
                    f"Got answers of up to {max_new_tokens} tokens; expected fewer than the {self.max_length} that the "
                    "model reads, question included."
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]

            def is_done(index: int, tokens: list[int], numbers: list[int] = numbers) -> bool:
                number = numbers[index]
                if tokens[-1] in self.stop_ids:
                    return True
                text = self._decode(tokens)
                if any(stop in text for stop in stops[number]):
                    return True
                return self.is_decided is not None and self.is_decided(requests[number].doc, text)

            continued = self.batched.generate(
                prompts, max_new_tokens=max_new_tokens, is_done=is_done, progress=self.progress
            )
            for number, tokens in zip(numbers, continued, strict=True):
                answers[number] = postprocess_generated_text(self._decode(tokens), stops[number], None)
        return [answer or "" for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not needed by any of the tasks."""
        raise NotImplementedError("pat.nll measures whole texts")

    def _decode(self, tokens: list[int]) -> str:
        """Return the text up to the first stop token, which need not be flagged as special."""
        before = list(takewhile(lambda token: token not in self.stop_ids, tokens))
        return str(self.tokenizer.decode(before, skip_special_tokens=True))


def _stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens at which the model's own `generate` stops, too."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    if isinstance(own, torch.Tensor):
        ids = own.tolist()
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)
