"""The hooked layers, seen as libraries see them that walk over a model's modules."""

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import build
from tiny_training import attach, logits, pat_config, tuner_of
from torch import nn

from pat.method.basis import UnifiedMask
from pat.method.operator import DenseOperator, LowRankOperator
from pat.tuner.layer import HsmLayer, MaskLayer

HIDDEN = 8
CPU = torch.device("cpu")


def hsm(*, tied: bool = False) -> tuple[HsmLayer, nn.Linear, nn.Identity]:
    mask_layer = MaskLayer()
    mask_layer.add_adapter("default", UnifiedMask(HIDDEN, 4), CPU)
    layer = HsmLayer(mask_layer)
    layer.add_adapter("default", LowRankOperator(HIDDEN, 2), CPU)
    layer.set_adapter("default")
    mask_layer.set_adapter("default")
    if tied:
        layer.tied_adapters.add("default")
    site, final_norm = nn.Linear(HIDDEN, HIDDEN), nn.Identity()
    layer.attach(site, final_norm)
    with torch.no_grad():
        layer.operator("default").scale.fill_(0.5)
    return layer, site, final_norm


def test_the_hook_applies_operator_and_then_mask() -> None:
    layer, site, _ = hsm()
    mask = layer._mask_layer[0].mask("default")
    with torch.no_grad():
        mask.weight.copy_(torch.arange(HIDDEN) - 3.5)
    mask.set_step(3, 10)
    x = torch.randn(2, HIDDEN)
    y = nn.functional.linear(x, site.weight, site.bias)
    operator = layer.operator("default")
    expected = mask.values() * (y + (operator.up @ torch.diag(operator.scale) @ operator.down @ y.mT).mT)
    torch.testing.assert_close(site(x), expected)


def test_the_head_of_a_tied_model_sees_factor_and_then_transposed_operator() -> None:
    layer, _, final_norm = hsm(tied=True)
    factor = torch.rand(HIDDEN) + 0.5
    layer._mask_layer[0].mask("default").head_factor = factor
    operator, x = layer.operator("default"), torch.randn(2, HIDDEN)
    d = torch.eye(HIDDEN) + operator.up @ torch.diag(operator.scale) @ operator.down
    torch.testing.assert_close(final_norm(x), (factor * x) @ d)


def test_without_a_tie_the_final_norm_is_left_alone() -> None:
    _, _, final_norm = hsm(tied=False)
    x = torch.randn(2, HIDDEN)
    assert final_norm(x) is x


@pytest.mark.parametrize("tied", [True, False])
def test_disabled_and_detached_layers_do_nothing(tied: bool) -> None:
    layer, site, final_norm = hsm(tied=tied)
    x = torch.randn(2, HIDDEN)
    plain = nn.functional.linear(x, site.weight, site.bias)
    layer.enable_adapters(False)
    assert torch.equal(site(x), plain) and final_norm(x) is x
    layer.enable_adapters(True)
    assert not torch.equal(site(x), plain)
    layer.detach()
    assert torch.equal(site(x), plain) and final_norm(x) is x
    assert not site._forward_hooks and not final_norm._forward_hooks


def test_attaching_again_moves_the_hook() -> None:
    layer, site, _ = hsm()
    other = copy.deepcopy(nn.Linear(HIDDEN, HIDDEN))
    layer.attach(other, None)
    assert not site._forward_hooks and len(other._forward_hooks) == 1


def test_the_layers_pretend_to_no_weight() -> None:
    """peft's own property would recurse without end, also for `hasattr`, which libraries ask of every module."""
    model = attach(build("llama", tied=True))
    layers = [module for module in model.modules() if isinstance(module, HsmLayer | MaskLayer)]
    assert layers and all(isinstance(layer, BaseTunerLayer) for layer in layers)
    for layer in layers:
        assert not hasattr(layer, "weight") and not hasattr(layer, "bias")
        assert layer.get_base_layer() is layer
        layer.merge()
        layer.unmerge()


def test_moving_the_model_moves_everything() -> None:
    model = attach(build("llama", tied=True))
    model.to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert logits(model).dtype == torch.float64
    assert {buffer.dtype for buffer in tuner_of(model).mask().buffers()} == {torch.float64, torch.bool, torch.int64}


def test_a_head_on_another_device_than_the_embedding() -> None:
    """Models spread over devices: factor and operator live beside the embedding, the final norm beside the head."""
    layer, _, final_norm = hsm(tied=True)
    layer._mask_layer[0].mask("default").head_factor = torch.rand(HIDDEN) + 0.5
    x = torch.randn(2, HIDDEN, device="meta")
    assert final_norm(x).device == x.device
    assert layer.operator("default").down.device == CPU
    layer.operators["default"] = DenseOperator(HIDDEN)
    assert final_norm(x).device == x.device


def test_the_regularisers_of_a_model_on_several_devices_are_summed_on_the_mask_s() -> None:
    tuner = tuner_of(attach(build("llama", tied=True), rotation="none", mask="frozen"))
    tuner.mask().to("meta")
    assert {loss.device.type for loss in tuner.regularizers().values()} == {"meta"}


def test_a_name_that_was_tied_can_be_used_again_untied() -> None:
    model = attach(build("llama", tied=True), rotation="none")
    model.add_adapter("other", pat_config(rotation="none"))
    layers = [module for module in model.modules() if isinstance(module, HsmLayer) and module.tied_adapters]
    assert [layer.tied_adapters for layer in layers] == [{"default", "other"}]
    model.delete_adapter("other")
    assert layers[0].tied_adapters == {"default"}
    model.add_adapter("other", pat_config(rotation="none", untie_word_embeddings=True))
    assert layers[0].tied_adapters == {"default"}
    layers[0].set_tied("default", tied=False)
    assert not layers[0].tied_adapters
