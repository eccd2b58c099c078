"""Negative log-likelihood of responses and of plain text. Pure torch and transformers.

Shapes: B rows of a batch, T tokens of its longest row, V vocabulary, N scored tokens.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from pat.errors import PatError
from pat.paths import near
from pat.report.progress import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Example = Mapping[str, Sequence[int]]
"""One tokenised row: `input_ids`, and as many `labels` (-100: not scored)."""

IGNORED = -100

LOGIT_ROWS = 256
"""Number of rows of logits that are turned into float32 at once; a vocabulary of 262,144 takes 1 MB a row."""


@dataclass(frozen=True)
class NLL:
    """Mean negative log-likelihood in nats per token, and over how many tokens."""

    nll: float
    num_tokens: int
    standard_error: float | None
    """Standard error of the mean, over rows (or windows of a text) because the tokens of a row hang together: with n_i
    tokens and the sum s_i in row i of m, it is sqrt(m / (m - 1) * sum((s_i - nll * n_i)^2)) / sum(n_i). It is None for
    one row."""
    perplexity: float
    """The exponential of `nll`; infinite where that overflows."""

    def per(self, num_tokens: int) -> "NLL":
        """Return the same sum per token of another vocabulary, in which the same text is so many tokens."""
        factor = self.num_tokens / num_tokens
        error = None if self.standard_error is None else self.standard_error * factor
        return NLL(self.nll * factor, num_tokens, error, _exponential(self.nll * factor))


def batches_from_examples(
    examples: Sequence[Example], *, batch_size: int, pad_token_id: int, sort_by_length: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of `input_ids`, `attention_mask` and `labels`, each of shape (B, T), int64.

    Labels are -100 on padding. With `sort_by_length` the longest rows
    come first: little padding, and what does not fit in memory fails at once.
    """
    order = _by_length(examples) if sort_by_length else list(range(len(examples)))
    for start in range(0, len(order), batch_size):
        rows = [examples[index] for index in order[start : start + batch_size]]
        ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
        yield {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


def _by_length(examples: Sequence[Example]) -> list[int]:
    """Return the indices of examples, those of the longest first."""
    return sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))


def response_nll(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    progress: Progress | None = None,
) -> NLL:
    """Mean NLL of the scored tokens of `examples` under a causal language model, all weighing the same.

    The first token of a row has nothing to condition on and is never scored. Log-softmax in float32, sum in
    float64, no gradients; every submodule's train/eval mode is as before afterwards.

    Raises:
        PatError: there is no token to score.
    """
    return response_nll_by_row(model, examples, batch_size=batch_size, pad_token_id=pad_token_id, progress=progress)[0]


def response_nll_by_row(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_token_id: int,
    progress: Progress | None = None,
) -> tuple[NLL, Tensor]:
    """Return what `response_nll` returns, and of each example its sum in nats and its scored tokens, (M, 2), float64.

    Raises:
        PatError: there is no token to score.
    """
    device = next(model.parameters()).device
    num_batches = math.ceil(len(examples) / batch_size)
    total, num_tokens = 0.0, 0
    rows: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        batches = batches_from_examples(examples, batch_size=batch_size, pad_token_id=pad_token_id, sort_by_length=True)
        for done, batch in enumerate(batches, start=1):
            targets_BT = batch["labels"][:, 1:].to(device)
            scored_BT = targets_BT != IGNORED
            logits_BTV = model(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                use_cache=False,
            ).logits
            logits_NV, targets_N = logits_BTV[:, :-1][scored_BT], targets_BT[scored_BT]
            row_N = scored_BT.nonzero()[:, 0].cpu()
            sums_B2 = torch.zeros(len(scored_BT), 2, dtype=torch.float64)
            for start in range(0, len(targets_N), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                nll_N = cross_entropy(logits_NV[part].float(), targets_N[part], reduction="none").cpu().double()
                total += nll_N.sum().item()
                sums_B2.index_add_(0, row_N[part], torch.stack([nll_N, torch.ones_like(nll_N)], dim=1))
            rows.append(sums_B2)
            num_tokens += len(targets_N)
            if progress is not None:
                progress(done, num_batches)
    if num_tokens == 0:
        raise PatError(f"Got {len(examples)} examples without a response token to score; pass rows with responses.")
    nll = total / num_tokens
    rows_M2 = torch.empty(len(examples), 2, dtype=torch.float64)
    rows_M2[_by_length(examples)] = torch.cat(rows)
    return NLL(nll, num_tokens, _standard_error(nll, rows_M2), _exponential(nll)), rows_M2


def paired_standard_error(rows_M2: Tensor, base_M2: Tensor) -> float | None:
    """Return the standard error of the difference between two models' losses on the same examples.

    It is that of `NLL` with the difference of the two sums of each row in place of its sum: how hard a row is for both
    models cancels out, so that it is mostly smaller than the errors of the two losses.

    Args:
        rows_M2: of one model, see `response_nll_by_row`.
        base_M2: of the other, whose tokens are the unit. Both are of the same texts, in the same order.
    """
    differences_M, tokens_M = rows_M2[:, 0] - base_M2[:, 0], base_M2[:, 1]
    mean = (differences_M.sum() / tokens_M.sum()).item()
    return _standard_error(mean, torch.stack([differences_M, tokens_M], dim=1))


def _exponential(nll: float) -> float:
    return torch.tensor(nll, dtype=torch.float64).exp().item()


def _standard_error(nll: float, rows_M2: Tensor) -> float | None:
    """Return the standard error of a ratio of sums over rows, of each the sum of its losses and its tokens."""
    rows_M2 = rows_M2[rows_M2[:, 1] > 0]
    num_rows = len(rows_M2)
    if num_rows < 2:
        return None
    residuals_M = rows_M2[:, 0] - nll * rows_M2[:, 1]
    return math.sqrt(num_rows / (num_rows - 1) * residuals_M.square().sum().item()) / rows_M2[:, 1].sum().item()


def text_perplexity(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    *,
    context: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> NLL:
    """NLL of a text in windows of at most `context` tokens; each token that follows another is scored once.

    Args:
        context: window length, lowered to what the model's positions allow.
        max_tokens: use the first so many tokens of the text only.

    If the tokenizer starts texts with a beginning-of-sequence token, so does every window: models trained
    that way (Gemma) predict badly without it.

    Raises:
        PatError: fewer than two tokens; a context without room for two.
    """
    room = min(context, max_positions(getattr(model, "config", None)) or context)
    windows = text_windows(tokenizer, text, room, max_tokens=max_tokens)
    # Any id serves as padding: it is masked, and with a single length per text there is hardly any.
    return response_nll(model, windows, batch_size=batch_size, pad_token_id=0, progress=progress)


def text_windows(
    tokenizer: "PreTrainedTokenizerBase", text: str, context: int, *, max_tokens: int | None = None
) -> list[Example]:
    """Return a text, or its first tokens, in windows of at most `context` tokens, each token to be scored once.

    Raises:
        PatError: fewer than two tokens; a context without room for two.
    """
    prefix, body = _tokens(tokenizer, text)
    body = body[:max_tokens]
    if len(body) < 2:
        raise PatError(f"Got a text of {len(body)} tokens, perplexity needs at least 2; pass a longer text.")
    if context - len(prefix) < 2:
        raise PatError(f"Got a context of {context} tokens, expected {2 + len(prefix)} or more.")
    return _windows(body, room=context - len(prefix), prefix=prefix)


def _windows(body: list[int], *, room: int, prefix: list[int]) -> list[Example]:
    """Windows over `body` that score each token once, after at least one other; the `prefix` that opens each is not."""
    windows: list[Example] = []
    scored = 0
    while scored < len(body):
        end = min(len(body), scored + (room - 1 if scored else room))
        window = body[max(0, end - room) : end]
        new = body[scored:end]
        labels = [IGNORED] * (len(prefix) + len(window) - len(new)) + new
        windows.append({"input_ids": prefix + window, "labels": labels})
        scored = end
    return windows


def split_text(
    tokenizer: "PreTrainedTokenizerBase", text: str, length: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Return the first tokens of a text as sequences of at most `length`.

    Where the tokenizer starts texts with a beginning-of-sequence token, every sequence does.
    """
    prefix, body = _tokens(tokenizer, text)
    body = body[: max_tokens and max_tokens - len(prefix)]
    room = length - len(prefix)
    return [prefix + body[start : start + room] for start in range(0, len(body), room)]


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[int]]:
    """Return the beginning-of-sequence token, if the tokenizer sets it, and the tokens after it."""
    # verbose=False: a whole file is longer than the model's window, which is no reason to warn.
    ids = list(tokenizer(text=text, verbose=False)["input_ids"])
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return (ids[:1], ids[1:]) if begins else ([], ids)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; `PatError` if it is missing or empty."""
    path = path.expanduser()
    if not os.path.isfile(path):
        raise PatError(f"{path}: no such file{near(path, folder=False)}; expected a UTF-8 text file.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is none of the text
    except (OSError, UnicodeDecodeError) as error:
        raise PatError(f"{path}: not readable as UTF-8 text ({error}); pass a plain text file.") from error
    if not text.strip():
        raise PatError(f"{path} is empty; expected some text.")
    return text


def max_positions(config: "PretrainedConfig | None") -> int | None:
    """Return the number of positions that a model has; None if it sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return limit if isinstance(limit, int) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every submodule's mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
