"""Memory for tuning: adapter and optimizer to the byte, activations near what autograd saves."""

import itertools
from typing import Any

import pytest
import torch
from tiny_models import batch, build
from tiny_training import attach, tuner_of
from torch import nn
from transformers import PreTrainedModel

from pat.surgery.costs import build_skeleton
from pat.tuner import PatConfig
from pat.tuner.memory import TrainingMemory, training_memory

TOLERANCE = {torch.float32: 0.15, torch.bfloat16: 0.25}
"""What the estimate's docstring claims."""

ROWS, LENGTH = 2, 128


def planned(base: PreTrainedModel, **fields: Any) -> TrainingMemory:
    skeleton = build_skeleton(base.config, base.dtype)
    config = PatConfig(task_type="CAUSAL_LM", r=4, **fields)
    return training_memory(skeleton, config, batch_size=ROWS, length=LENGTH)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_base_adapter_gradients_and_adam_are_counted_to_the_byte(family: str) -> None:
    base = build(family, tied=True)
    memory = planned(base, axes=["hidden"])
    own = {id(t): t.nbytes for t in (*base.parameters(), *base.buffers())}
    model = attach(base, r=4, operator_rank=None)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trainable)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    added = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in own]
    assert memory.num_trainable_parameters == sum(p.numel() for p in trainable)
    assert memory.base_bytes == sum(p.nbytes for p in base.parameters() if id(p) in own)
    assert memory.adapter_bytes == sum(t.nbytes for t in added)
    assert memory.optimizer_bytes == sum(p.grad.nbytes for p in trainable) + sum(t.nbytes for t in moments)  # type: ignore[union-attr]
    exact = memory.base_bytes + memory.adapter_bytes + memory.optimizer_bytes
    assert memory.total_bytes == exact + memory.activation_bytes
    assert memory.checkpointed_total_bytes == exact + memory.checkpointed_activation_bytes


def saved_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of everything that autograd saves, weights and buffers excepted."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
        output = model(input_ids=batch(batch_size=ROWS, length=LENGTH)["input_ids"], use_cache=False)
    del output
    return sum(storage.nbytes() for storage in storages.values())


def in_two_layers(family: str, dtype: torch.dtype, *, checkpointing: bool = False) -> tuple[int, int]:
    """Return estimate and measurement for two layers: three less one, or the logits would count, which do not belong
    to a layer.
    """
    estimated, saved = [], []
    for num_layers in (1, 3):
        types = {"layer_types": ["full_attention"] * num_layers} if family == "gemma2" else {}
        shape = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": num_layers} | types
        base = build(family, tied=False, dtype=dtype, **shape)
        memory = planned(base, rotation="none")
        estimated.append(memory.checkpointed_activation_bytes if checkpointing else memory.activation_bytes)
        model = attach(base, r=4, rotation="none", operator_rank=None).train()
        tuner_of(model).set_step(1, 10)
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable(
                {"use_reentrant": True}
            )  # the other kind saves where no hook sees it
            model.enable_input_require_grads()
        saved.append(saved_bytes(model, dtype))
    return estimated[1] - estimated[0], saved[1] - saved[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "mixtral"])
def test_the_estimate_of_activations_is_near_what_autograd_saves(family: str, dtype: torch.dtype) -> None:
    estimated, saved = in_two_layers(family, dtype)
    assert estimated == pytest.approx(saved, rel=TOLERANCE[dtype])


def test_with_checkpointing_a_layer_keeps_its_input_and_one_layer_at_a_time_the_rest() -> None:
    estimated, saved = in_two_layers("llama", torch.float32, checkpointing=True)
    assert estimated == pytest.approx(saved, rel=0.01)
    memory = planned(build("llama", tied=False, num_hidden_layers=2))
    kept = 2 * ROWS * LENGTH * 48 * 4
    assert memory.checkpointed_activation_bytes == kept + memory.activation_bytes // 2
