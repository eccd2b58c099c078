"""The answers of transformers, against which every exported file is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pat.errors import RunFailed
from pat.general_text import general_text

PROMPT_TOKENS, NEW_TOKENS = 32, 30

TIE = 1e-3
"""Two engines in float32 may take different tokens whose logits are as near; PAT's own bound on a logit."""


@dataclass(frozen=True)
class Reference:
    """A model in float32 and the tokens it is asked about."""

    model: PreTrainedModel
    text: str
    tokens: tuple[int, ...]
    """The text, as the tokenizer reads it."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any) -> Reference:
        """Return the reference of a model, on the text that merges are verified on."""
        text = general_text()[:400]
        return cls(model.eval(), text, tuple(tokenizer(text)["input_ids"]))

    @property
    def prompt(self) -> list[int]:
        """Tokens that an engine continues, as many as leave room in the model for those that it adds."""
        room = self.model.config.max_position_embeddings - NEW_TOKENS - 1
        return list(self.tokens[: max(min(PROMPT_TOKENS, room), 1)])

    @torch.no_grad()
    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits of a batch of equally long rows, `(batch, length, vocabulary)`."""
        logits: Tensor = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return logits.float()

    @torch.no_grad()
    def compare(self, found: Sequence[int]) -> tuple[int, int]:
        """Hold another engine's likeliest tokens behind the prompt against the model's own.

        Each token is held against what the model takes behind the engine's tokens before it.

        Returns:
            How many tokens are the model's own, and how many are others that are as likely, a tie.
        """
        rows = self.logits(torch.tensor([[*self.prompt, *found]]))[0, len(self.prompt) - 1 : -1]
        taken = torch.tensor(list(found))
        own = rows.argmax(-1) == taken
        near = rows.amax(-1) - rows.gather(-1, taken[:, None])[:, 0] < TIE
        return int(own.sum()), int((near & ~own).sum())


@dataclass(frozen=True, kw_only=True)
class Check:
    """A comparison of an exported file, or of what it was made from, with transformers."""

    engine: str
    version: str | None
    what: str
    value: float
    bound: float | None
    """What the value may be at most, or, of tokens, has to be; None where it is only told."""


def require(holds: bool, what: str) -> None:
    """End an export whose file is not the model.

    Raises:
        RunFailed: it does not hold.
    """
    if not holds:
        raise RunFailed(f"The file is not the model, and nothing was written: {what}.")
