"""What an adapter's file may hold."""

import torch
from peft import get_peft_model, get_peft_model_state_dict
from tiny_models import build

from pat.checkpoint import trust
from pat.tuner import PatConfig


def test_the_tensors_that_are_no_real_numbers_are_known() -> None:
    axes = ["hidden", "mlp", "heads", "layers"]
    model = get_peft_model(build("llama", tied=True), PatConfig(task_type="CAUSAL_LM", axes=axes, pruning_ratio=0.4))
    names = {torch.bool: "BOOL", torch.int64: "I64"}
    found = {
        name.rpartition(".")[2]: (names[tensor.dtype],)
        for name, tensor in get_peft_model_state_dict(model).items()
        if not tensor.is_floating_point()
    }
    assert found == trust._COUNTS
