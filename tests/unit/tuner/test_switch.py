"""Without its pruning an adapted model is its base with LoRA merged, as stock peft merges it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import shallow
from tiny_training import RANK, attach, largest_difference, logits, train

from pat.tuner.switch import without_pruning

ROUNDING = 1e-5
"""Of logits of size one in float32: a merge adds B A to W, which the layer adds to the output."""

CASES: dict[str, dict[str, Any]] = {
    "rotated": {"rotation": "pca"},
    "both axes": {"axes": ["hidden", "mlp"], "pruning_ratio": 0.4},
    "rslora, dora": {"use_rslora": True, "use_dora": True, "rotation": "none"},
    "saved": {"modules_to_save": ["lm_head"], "rotation": "none"},
    "added tokens": {"trainable_token_indices": [3, 5], "rotation": "none"},
}


def stock(model: PeftModel, tied: bool, fields: dict[str, Any]) -> PeftModel:
    """The same factors in peft's own LoRA on a base of its own."""
    ours = ("use_rslora", "use_dora", "modules_to_save", "trainable_token_indices")
    targets = sorted(model.active_peft_config.target_modules)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=targets, **{name: fields[name] for name in ours if name in fields}
    )
    lora = get_peft_model(shallow("llama", tied=tied), config)
    missing = lora.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    return lora


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_base_with_lora_merged(case: str) -> None:
    fields, tied = CASES[case], case not in ("saved",)
    base = shallow("llama", tied=tied)
    before = logits(base)
    model = attach(base, **fields)
    train(model, max_steps=3)
    masked = logits(model)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with without_pruning(model):
        switched = logits(model)
    merged = logits(stock(model, tied, fields).merge_and_unload())
    assert largest_difference(switched, merged) < ROUNDING
    assert largest_difference(switched, before) > 0.1 and largest_difference(switched, masked) > 0.1
    assert torch.equal(logits(model), masked)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_a_model_that_is_frozen_or_switched_off_stays_so() -> None:
    model = attach(shallow("llama", tied=True), rotation="none").requires_grad_(False)
    with model.disable_adapter():
        plain = logits(model)
        with without_pruning(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)
    model.requires_grad_(False)  # which peft's own switch does not remember
    with without_pruning(model):
        pass
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "pat_" in name)
