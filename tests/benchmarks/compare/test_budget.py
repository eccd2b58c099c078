"""Equal budgets."""

import pytest
from compare.budget import lora_parameters_per_rank, lora_rank, lora_targets
from peft import LoraConfig, get_peft_model
from tiny_models import build
from torch import nn


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_per_rank_are_those_of_peft(tied: bool) -> None:
    base = build("llama", tied=tied)
    targets = lora_targets(base)
    assert "lm_head" not in targets and {"q_proj", "down_proj"} <= set(targets)
    expected = 3 * lora_parameters_per_rank(base, targets)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=targets))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_the_rank_comes_closest() -> None:
    base = build("llama", tied=True)
    targets = lora_targets(base)
    per_rank = lora_parameters_per_rank(base, targets)
    assert lora_rank(base, targets, 5 * per_rank + per_rank // 3) == 5
    assert lora_rank(base, targets, 1) == 1


def test_doras_magnitudes_count() -> None:
    base = build("llama", tied=True)
    targets = lora_targets(base)
    budget = 6 * lora_parameters_per_rank(base, targets)
    rank = lora_rank(base, targets, budget, dora=True)
    counts = {}
    for r in (rank - 1, rank, rank + 1):
        model = get_peft_model(build("llama", tied=True), LoraConfig(r=r, target_modules=targets, use_dora=True))
        counts[r] = abs(sum(p.numel() for p in model.parameters() if p.requires_grad) - budget)
    assert counts[rank] == min(counts.values())


def test_what_pruning_adds_is_not_tuned() -> None:
    base = build("llama", tied=True)
    targets = lora_targets(base)
    before = lora_parameters_per_rank(base, targets)
    base.model.layers[0].shortcut = nn.Linear(8, 8, bias=False)
    assert lora_parameters_per_rank(base, targets) == before
