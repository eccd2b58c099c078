"""At the compaction point the small model with its LoRA adapter is the masked model, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from masked64 import CASES, KEPT, logits64, masked_model
from peft import LoraConfig
from tiny_training import largest_difference, tuner_of
from torch import nn

from pat.tuner.compaction import CompactModel

FLOAT32 = 1e-4
"""What a user's float32 model may differ by."""


def compacted(model: nn.Module) -> CompactModel:
    compact = tuner_of(model).compact()
    if next(p for p in model.parameters()).dtype == torch.float64:
        compact.model.double()
    compact.model.eval()
    return compact


@pytest.mark.parametrize(("family", "tied", "dora", "rotation"), CASES)
def test_masked_and_compact_model_agree_in_float64(
    family: str, tied: bool, dora: bool, rotation: str, record_property: Any
) -> None:
    model = masked_model(family, tied=tied, rotation=rotation, use_dora=dora)
    masked = logits64(model)
    compact = compacted(model).model
    difference = largest_difference(masked, logits64(compact))
    record_property("max_logit_difference_float64", difference)
    # peft keeps adapters in float32, and a DoRA magnitude is computed in it.
    assert difference <= (1e-5 if dora else 1e-6)
    assert torch.equal(logits64(model), masked)  # and the masked model is as it was
    assert compact.get_base_model().config.hidden_size == KEPT
    assert type(compact.peft_config["default"]) is LoraConfig
