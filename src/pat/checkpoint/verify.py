"""Is the dense model the model that was trained? Compare two models on text, and hold the figures against rounding.

Shapes: B rows of a batch, T tokens, V vocabulary, N real (not padded) tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from pat.errors import ParityMissed, PatError
from pat.nll import LOGIT_ROWS, evaluating
from pat.report.numbers import deviation
from pat.surgery.dense import build_dense, shrink_config
from pat.surgery.describe import head_dim, map_of
from pat.surgery.fold import Channels, HeadPlan, fold_weights
from pat.surgery.residual import model_tensors

MAX_LOGIT_DIFF = 1e-3
"""Float32 and better. A mere permutation of the residual channels moves the logits of SmolLM2-135M by 1e-4, those of
stories260K by 3e-5; a norm's epsilon left as it was moves them by 1e-2 and more."""

MAX_KL = {"float16": 1e-3, "bfloat16": 1e-2}
MAX_DISAGREEMENT = {"float16": 0.05, "bfloat16": 0.15}
"""Reduced precision: mean KL in nats per token, share of tokens with another top-1. The masked model rounds after every
operator, the merged weights are rounded once, so single logits say little (up to 1.9 apart in bfloat16). Measured on
SmolLM2-135M and stories260K, tuned and merged: 0.0025 nats and 6.6 % at most in bfloat16 (a 4-bit base computing in
bfloat16 included), 0.00005 nats and 0.5 % in float16; permuting the base's channels in bfloat16: 0.0013 and 2 %."""


MAX_FLOORS = 5
FLOOR_KL = 1e-7
"""A model may blow up rounding itself, such as one cut and hardly tuned whose residual stream reaches into the
thousands: SmolLM2-135M after 30 steps of the paper's recipe is moved by 2.4e-3 if its channels are merely permuted, and
by 1.7e-3 by its merge. Past MAX_LOGIT_DIFF a difference is still rounding if it is at most MAX_FLOORS times that of the
permutation (`permutation_floor`), and so is the mean KL, which has FLOOR_KL of noise in itself. On stories260K merges
stay below 5 floors, a norm's gain or epsilon left as it was is above."""


MERGE_REFUSED = (
    "The merged model is not the tuned one: {missed}. Nothing was written; the adapter is unharmed, and merging it in "
    "float32 tells rounding from error."
)


@dataclass(frozen=True)
class Parity:
    """How far two models are apart on the same text."""

    max_abs_logit_diff: float
    mean_kl: float
    """KL(masked || dense) in nats per token."""
    top1_agreement: float
    """Share of the tokens after which both expect the same next token."""
    num_tokens: int
    logit_std: float
    """Mean over the tokens of the standard deviation of the masked model's logits: the scale of the first figure."""
    dtype: str
    """The coarser of the two models' computing dtypes, such as `bfloat16`; it decides what `check` allows."""
    permutation_floor: float | None = None
    """What permuting the dense model's channels moves a logit by; measured only if the first figure is past 1e-3."""

    def describe(self) -> str:
        """Return the figures as one sentence."""
        text = (
            f"Tuned and written model differ by at most {deviation(self.max_abs_logit_diff)} in a logit (KL "
            f"{deviation(self.mean_kl)} nats per token, same top token in {self.top1_agreement:.2%} of "
            f"{self.num_tokens:,}, {self.dtype})."
        )
        if self.permutation_floor is not None:
            text += (
                f" That is rounding, which this model blows up: permuting its channels alone makes "
                f"{deviation(self.permutation_floor)}."
            )
        return text


def check(parity: Parity, refusal: str = MERGE_REFUSED, *, floor: Callable[[], Parity] | None = None) -> Parity:
    """Accept a comparison as "the same function up to rounding", or raise.

    Args:
        parity: the figures.
        refusal: message with a place for what was `missed`.
        floor: gives the `permutation_floor` of the dense model on the same text; asked for only if float32 misses.

    Returns:
        The figures, with that of the floor if it was asked for.

    Raises:
        ParityMissed: a figure is past its tolerance, or not a number.
    """
    if parity.dtype in ("float32", "float64"):
        limits = {"max |Δlogit|": (parity.max_abs_logit_diff, MAX_LOGIT_DIFF)}
    else:
        limits = {
            "mean KL": (parity.mean_kl, MAX_KL[parity.dtype]),
            "top-1 disagreement": (1 - parity.top1_agreement, MAX_DISAGREEMENT[parity.dtype]),
        }
    # Written so that a NaN fails.
    missed = [f"{name} {value:.3g} > {limit:g}" for name, (value, limit) in limits.items() if not value <= limit]
    if missed and floor is not None and parity.dtype in ("float32", "float64"):
        rounding = floor()
        parity = replace(parity, permutation_floor=rounding.max_abs_logit_diff)
        if (
            parity.max_abs_logit_diff <= MAX_FLOORS * rounding.max_abs_logit_diff
            and parity.mean_kl <= MAX_FLOORS * rounding.mean_kl + FLOOR_KL
        ):
            return parity
        missed.append(f"{MAX_FLOORS} times what rounding does to it, {rounding.max_abs_logit_diff:.3g}")
    if missed:
        figures = f"{', '.join(missed)} in {parity.dtype} over {parity.num_tokens} tokens"
        raise ParityMissed(refusal.format(missed=figures))
    return parity


@torch.no_grad()
def compare(masked: nn.Module, dense: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Parity:
    """Compare a masked model with a dense one on the real tokens of some batches.

    Both run in eval mode, without reduced-precision float32 products and outside any mixed-precision wrapper that a
    trainer has left on the masked model; all of that is as before afterwards.

    Args:
        masked: a peft model with a PAT adapter, or any causal language model.
        dense: a causal language model of the same vocabulary.
        batches: `input_ids`, optional `attention_mask` and `position_ids`, each `(B, T)`; other keys are ignored.

    Raises:
        PatError: the batches hold no token.
    """
    first, second = _network(masked), _network(dense)
    max_diff = torch.zeros((), dtype=torch.float64)
    kl = std = 0.0
    num_agreeing = num_tokens = 0
    with evaluating(first), evaluating(second), _exact_float32():
        for batch in batches:
            logits_NV, other_NV = _real_logits(first, batch), _real_logits(second, batch)
            num_tokens += len(logits_NV)
            for start in range(0, len(logits_NV), LOGIT_ROWS):
                a_NV = logits_NV[start : start + LOGIT_ROWS].float()
                b_NV = other_NV[start : start + LOGIT_ROWS].to(a_NV)
                # `maximum` hands on a NaN; Python's max would lose it.
                max_diff = torch.maximum(max_diff, (a_NV - b_NV).abs().max().cpu().double())
                num_agreeing += int((a_NV.argmax(-1) == b_NV.argmax(-1)).sum())
                std += a_NV.std(-1).cpu().double().sum().item()
                p_NV, q_NV = a_NV.log_softmax(-1), b_NV.log_softmax(-1)
                kl += (p_NV.exp() * (p_NV - q_NV)).sum(-1).cpu().double().sum().item()
    if num_tokens == 0:
        raise PatError("The text to verify the merged model on holds no tokens; pass batches with input_ids.")
    return Parity(
        max_abs_logit_diff=max_diff.item(),
        # Rounding takes the sum of a distribution's terms a little below its true bound, zero.
        mean_kl=kl / num_tokens if math.isnan(kl) else max(0.0, kl / num_tokens),
        top1_agreement=num_agreeing / num_tokens,
        num_tokens=num_tokens,
        logit_std=std / num_tokens,
        dtype=str(_coarser(_compute_dtype(first), _compute_dtype(second))).removeprefix("torch."),
    )


def permutation_floor(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Parity:
    """Compare a model with itself, its residual channels merely permuted: the noise floor of float arithmetic.

    Nothing but the order of sums differs, so no merge can be expected to do better than a small multiple of this. The
    model is unquantised and without adapter.
    """
    stream, tensors = map_of(model), model_tensors(model)
    family, tied = stream.family, stream.head is None
    hidden_size = getattr(model.config, family.hidden_size_field)
    order = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(0))
    config = shrink_config(model.config, family, {}, head_dim=head_dim(model), tied=tied)
    folded = fold_weights(
        stream, lambda name: tensors[name].detach(), Channels(hidden_size, order), {}, HeadPlan(tied=tied)
    )
    weights = {name: tensor.to(model.dtype) for name, tensor in folded}
    permuted: nn.Module = build_dense(model, config, weights, model.dtype)
    return compare(model, permuted.to(model.device), batches)


def _network(model: nn.Module) -> nn.Module:
    """Return the adapted transformers model inside a peft model, past what trainers wrap around the outermost."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _real_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    inputs = {
        key: torch.as_tensor(batch[key]).to(device)
        for key in ("input_ids", "attention_mask", "position_ids")
        if batch.get(key) is not None
    }
    logits_BTV = model(**inputs, use_cache=False).logits
    if "attention_mask" not in inputs:
        return cast(Tensor, logits_BTV.flatten(0, 1))
    return cast(Tensor, logits_BTV[inputs["attention_mask"].bool()])


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype a model computes in: a quantised one may differ from the dtype of its other weights."""
    quantization: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    own = cast(torch.dtype, getattr(model, "dtype", torch.float32))
    if quantization is None:
        return own
    if getattr(quantization, "load_in_8bit", False):
        return torch.bfloat16  # its products are of 8-bit activations, whatever the dtype around them
    inner = getattr(quantization, "bnb_4bit_compute_dtype", None)
    return _coarser(own, inner if isinstance(inner, torch.dtype) else torch.bfloat16)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Switch TensorFloat-32 products off: their 10 bits would drown what is to be measured."""
    matmul = torch.backends.cuda.matmul
    # Mixing torch's new setting (2.9) with the old one is an error there.
    setting, exact = ("fp32_precision", "ieee") if hasattr(torch.backends, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        yield
    finally:
        setattr(matmul, setting, before)
