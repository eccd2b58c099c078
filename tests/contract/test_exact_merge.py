"""The merge is exact at every width, and a wrong one would be seen.

transformers computes norms, softmax, router and rotary angles in float32 whatever the model's dtype, which would leave
1e-6 between the two models and hide any smaller error of the merge. `Float64` lifts those casts for the test.
"""

from __future__ import annotations

import math

import pytest
import torch
from masked64 import KEPT, logits64, masked_model
from tiny_models import FAMILIES, KINDS, norm_modules, shallow
from tiny_training import attach, largest_difference, logits, tuner_of
from torch import nn
from transformers import PreTrainedModel

from pat.families import get_family

HIDDEN = 48

EXACT = 1e-11
"""Float64 throughout at logits of size one: three layers of sums over at most 80 products."""

VISIBLE = 1e-3
"""What a wrong merge must at least amount to: ten times the tolerance that users' models are verified with."""


@pytest.mark.parametrize(("family", "pruned"), [("gemma", 4), ("gemma3_text", 40), ("vaultgemma", 44), ("qwen3", 4)])
def test_other_widths_are_as_exact(family: str, pruned: int) -> None:
    """sqrt(36) is a round number, sqrt(40) is not: the embeddings' own scale is rounded as the models round it."""
    model = masked_model(family, tied=True, pruned=pruned)
    dense = model.merge_and_unload(dtype=torch.float64)
    assert largest_difference(logits64(model), logits64(dense)) <= EXACT


def test_the_casts_to_float32_are_what_the_mode_lifts() -> None:
    """Without it the same two models are 1e-9 to 1e-5 apart, which is the norms' and not the merge's."""
    model = masked_model("llama", tied=True)
    dense = model.merge_and_unload(dtype=torch.float64)
    assert 1e-9 < largest_difference(logits(model), logits(dense)) < 1e-5


# -- a wrong merge would be seen -------------------------------------------------------------------------------------


def broken(family: str, *, tied: bool) -> tuple[nn.Module, PreTrainedModel]:
    model = masked_model(family, tied=tied)
    return model, model.merge_and_unload(dtype=torch.float64)


@pytest.mark.parametrize("family", KINDS)
def test_an_epsilon_left_as_it_was_is_seen(family: str) -> None:
    model, dense = broken(family, tied=False)
    for _, norm in norm_modules(dense):
        attribute = "eps" if hasattr(norm, "eps") else "variance_epsilon"
        setattr(norm, attribute, getattr(norm, attribute) * KEPT / HIDDEN)
    assert largest_difference(logits64(model), logits64(dense)) > VISIBLE


@pytest.mark.parametrize("family", [name for name in FAMILIES if get_family(name).qk_norm])
@torch.no_grad()
def test_a_missing_qk_norm_factor_is_seen(family: str) -> None:
    model = masked_model(family, tied=False, pruned=HIDDEN // 2)
    dense = model.merge_and_unload(dtype=torch.float64)
    for name, parameter in dense.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.div_(math.sqrt(2))
    assert largest_difference(logits64(model), logits64(dense)) > VISIBLE


@pytest.mark.parametrize(("family", "tied"), [("gemma", True), ("gemma2", False), ("vaultgemma", True)])
@torch.no_grad()
def test_a_missing_embedding_ratio_is_seen(family: str, tied: bool) -> None:
    model, dense = broken(family, tied=tied)
    ratio = math.sqrt(HIDDEN / KEPT)
    dense.model.embed_tokens.weight.div_(ratio)
    if tied:  # even if the head's side were put right
        gain = 1 + dense.model.norm.weight
        dense.model.norm.weight.copy_(gain * ratio - 1)
    assert largest_difference(logits64(model), logits64(dense)) > VISIBLE


@pytest.mark.parametrize("family", KINDS)
@torch.no_grad()
def test_a_head_that_reads_the_input_operator_untransposed_is_seen(family: str) -> None:
    model, dense = broken(family, tied=True)
    operator = tuner_of(model).operators()["model.embed_tokens"]
    down, up = operator.down.clone(), operator.up.clone()
    operator.down.copy_(up.mT)
    operator.up.copy_(down.mT)
    transposed = model.merge_and_unload(dtype=torch.float64)
    dense.model.norm.weight.copy_(transposed.model.norm.weight)
    dense.lm_head.weight = transposed.lm_head.weight
    operator.down.copy_(down)
    operator.up.copy_(up)
    assert largest_difference(logits64(model), logits64(dense)) > VISIBLE


# -- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied"), [("gemma", True), ("gemma3_text", False)])
@pytest.mark.parametrize("upcast", ["before attaching", "never"])
def test_the_scale_of_a_bfloat16_embedding_is_the_one_the_model_uses(family: str, tied: bool, upcast: str) -> None:
    """bf16(sqrt(48)) is 6.9375 instead of 6.9282, and an upcast model keeps it: 0.13 % at the stream's start."""
    base = shallow(family, tied=tied, dtype=torch.bfloat16)
    if upcast == "before attaching":
        base = base.float()
    model = attach(base, pruned_hidden_size=40)
    tuner_of(model).set_step(1, 1)
    dense = model.merge_and_unload(dtype=torch.float64).eval()
    rows = torch.arange(10)
    kept = tuner_of(model).mask().keep_indices
    with torch.no_grad():
        old = (
            base.model.embed_tokens.weight[rows].double() * base.model.embed_tokens.embed_scale.to(base.dtype).double()
        )
        new = dense.model.embed_tokens(rows)
    torch.testing.assert_close(new, old[:, kept], atol=0, rtol=1e-6)
