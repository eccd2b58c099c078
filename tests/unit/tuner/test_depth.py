"""Which layers go: what the base model loses without each of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from masked64 import logits64
from tiny_models import batch, build
from tiny_training import attach, largest_difference, logits, tuner_of
from torch import nn
from torch.nn.functional import cross_entropy

from pat.errors import PatError, RunFailed
from pat.surgery.describe import map_of
from pat.tuner import depth
from pat.tuner.depth import losses_without
from pat.tuner.model import PatModel

DATA = [batch(seed=seed, batch_size=4) for seed in range(3)]


def cut(family: str = "llama", **fields: Any) -> PatModel:
    sizes = {"pruned_num_hidden_layers": 2}
    return tuner_of(attach(build(family, tied=True), axes=["layers"], **(sizes | fields)))


def without(model: nn.Module, number: int) -> nn.Module:
    """The model made without a layer, by hand."""
    small = copy.deepcopy(model)
    del small.model.layers[number]
    return small


@torch.no_grad()
def loss(model: nn.Module) -> float:
    total, num = 0.0, 0
    for inputs in DATA:
        real = inputs["attention_mask"].bool()
        scored = real[:, 1:]
        rows = model(**inputs, use_cache=False).logits[:, :-1][scored]
        total += float(cross_entropy(rows, inputs["input_ids"][:, 1:][scored], reduction="sum"))
        num += int(scored.sum())
    return total / num


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3"])
def test_the_loss_without_a_layer_is_that_of_a_model_that_lacks_it(family: str) -> None:
    model = build(family, tied=True)
    found = losses_without(model, map_of(model), DATA, 10**6)
    torch.testing.assert_close(
        found, torch.tensor([loss(without(model, i)) for i in range(3)]).double(), atol=1e-5, rtol=0
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_the_layer_goes_whose_loss_is_least_and_the_rest_is_the_model_without_it() -> None:
    tuner = cut()
    base = build("llama", tied=True)
    assert tuner.needs_calibration()
    assert tuner.calibrate(DATA) is None and not tuner.needs_calibration() and not tuner.mask().calibrated
    tuner.set_step(0, 0)
    least = int(losses_without(base, map_of(base), DATA, 10**6).argmin())
    gate = tuner.layer_gate()
    assert gate is not None and gate.keep.tolist() == [i != least for i in range(3)]
    expected = logits(without(base, least))
    assert largest_difference(logits(tuner.model), expected) <= 1e-5
    assert largest_difference(logits(tuner.merge_and_unload()), expected) <= 1e-5


def test_a_soft_gate_scales_both_branches_of_its_layer() -> None:
    tuner = cut()
    tuner.calibrate(DATA)
    tuner.set_step(2, 10)
    gate = tuner.layer_gate()
    assert gate is not None
    scaled = build("llama", tied=True).double()
    with torch.no_grad():
        for layer, value in zip(scaled.model.layers, gate.values(), strict=True):
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.mul_(value)
                writer.bias.mul_(value)
    values = gate.values().detach()
    assert float(values.min()) > 0 and float((values - 1).abs().max()) > 0.1
    tuner.model.double()
    assert largest_difference(logits64(tuner.model), logits64(scaled)) <= 1e-6


def test_layers_of_the_rarer_kind_stay_whatever_they_lose() -> None:
    tuner = cut("qwen3_moe")
    gate = tuner.layer_gate()
    assert gate is not None and gate.pinned.tolist() == [False, True, False]
    tuner.calibrate(DATA)
    tuner.set_step(0, 0)
    assert gate.keep[1] and tuner.merge_and_unload().config.mlp_only_layers in ([0], [1])
    with pytest.raises(PatError, match="single layer"):
        attach(build("llama", tied=True, num_hidden_layers=1), axes=["layers"])


def test_lora_that_starts_anew_goes_to_the_same_layers() -> None:
    """Its configuration names layers by numbers, which are others in the small model."""
    tuner = cut(use_dora=True, layers_to_transform=[0, 2], rank_pattern={"layers.2.mlp.up_proj": 3})
    tuner.set_step(1, 1)
    gate = tuner.layer_gate()
    assert gate is not None
    with torch.no_grad():
        gate.keep.copy_(torch.tensor([False, True, True]))
    small = tuner.compact().attach().model.get_base_model().model.layers
    assert not hasattr(small[0].mlp.up_proj, "lora_A")
    assert small[1].mlp.up_proj.r["default"] == 3 and small[1].mlp.down_proj.r["default"] == 4
    assert small[1].mlp.up_proj.lora_magnitude_vector


@torch.no_grad()
def test_lora_that_goes_with_its_layers_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def keeping(*numbers: int, **fields: Any) -> PatModel:
        tuner = cut(**fields)
        tuner.set_step(1, 1)
        gate = tuner.layer_gate()
        assert gate is not None
        gate.keep.copy_(torch.tensor([number in numbers for number in range(3)]))
        return tuner

    targets = ["layers.1.self_attn.q_proj", "layers.2.mlp.down_proj"]
    saved = {"modules_to_save": ["layers.2.input_layernorm", "norm"]}
    small = keeping(0, 1, target_modules=targets, **saved).compact().attach().model.get_base_model().model.layers
    assert small[1].self_attn.q_proj.r["default"] == 4 and not hasattr(small[1].mlp.down_proj, "lora_A")
    assert (
        "LoRA is lost with its layers, and is on no module of that name in the others: model.layers.2.mlp.down_proj."
        in caplog.text
    )
    assert "modules_to_save are lost with their layers: layers.2.input_layernorm." in caplog.text
    for use_dora in (False, True):
        with pytest.raises(PatError, match=r"Got LoRA on model\.layers\.1\.self_attn\.q_proj, .* no module left"):
            keeping(0, use_dora=use_dora, target_modules=targets, pruned_num_hidden_layers=1).compact()
    caplog.clear()
    keeping(0, 1).compact()
    assert "lost with" not in caplog.text


def test_text_that_is_nothing_to_choose_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PatError, match="no tokens"):
        cut().calibrate([])
    monkeypatch.setattr(depth, "_loss", lambda *_: math.nan)
    with pytest.raises(RunFailed, match="finite"):
        cut().calibrate(DATA)
