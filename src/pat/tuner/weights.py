"""Effective weights of an adapted model: what each base parameter is with LoRA merged in, without touching the base."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from pat.errors import PatError
from pat.method.sharded import whole
from pat.surgery.adapted import AdaptedMatrix, merged

PREFIX = "lora_"
"""peft tells adapter parameters from base parameters by the prefix of LoRA's layers, which PAT shares."""


@torch.no_grad()
def effective_parameter(model: nn.Module, name: str, adapter_name: str) -> Tensor:
    """Return a base parameter as the adapted model uses it, in float32 or better.

    Args:
        model: the base model with peft's layers in it.
        name: full name of the parameter in the untouched base model.
        adapter_name: the adapter to merge in. Quantised weights are dequantised first.

    Raises:
        PatError: the adapter uses an option of LoRA that has no merged form.
    """
    return merged(factored_parameter(model, name, adapter_name))


@torch.no_grad()
def factored_parameter(model: nn.Module, name: str, adapter_name: str) -> Tensor | AdaptedMatrix:
    """Return what `effective_parameter` does, but a plain LoRA not multiplied out.

    Raises:
        PatError: the adapter uses an option of LoRA that has no merged form.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, ModulesToSaveWrapper):
        saved = dict(module.modules_to_save.items())
        module = saved.get(adapter_name, module.original_module)
    if isinstance(module, TrainableTokensWrapper):
        return _upcast(module.token_adapter.get_merged_weights([adapter_name]))
    if isinstance(module, ParamWrapper):
        return _expert_parameter(module, leaf, adapter_name)
    if isinstance(module, LoraLayer):
        return _lora_parameter(module, name, leaf, adapter_name)
    return _base_parameter(module, leaf)


@torch.no_grad()
def base_parameter(model: nn.Module, name: str) -> Tensor:
    """Return a base parameter without any adapter, in float32 or better; quantised weights are dequantised."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return _base_parameter(module.get_base_layer() if isinstance(module, LoraLayer) else module, leaf)


def embedding_ratio(embedding: nn.Module, pruned_hidden_size: int, dtype: torch.dtype) -> float:
    """Return by how much the scale that an embedding applies itself shrinks, each side as its model rounds it.

    Args:
        embedding: the base's, within whatever adapters; its scale may have been rounded by a dtype it once had.
        pruned_hidden_size: width of the dense model, which multiplies by its root.
        dtype: of the dense model.
    """
    scaled = next(m for m in embedding.modules() if isinstance(m, nn.Embedding) and hasattr(m, "embed_scale"))
    old = cast(Tensor, scaled.embed_scale).to(scaled.weight.dtype)
    return old.item() / torch.tensor(pruned_hidden_size**0.5, dtype=dtype).item()


def _lora_parameter(layer: LoraLayer, name: str, leaf: str, adapter_name: str) -> Tensor | AdaptedMatrix:
    has_adapter = adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A
    variant = layer.lora_variant.get(adapter_name)
    if has_adapter and leaf == "weight" and variant is None:
        weight = _dequantized(layer.get_base_layer())
        if type(layer) is Linear and not layer.fan_in_fan_out:
            return _factored(weight, layer, adapter_name)
        delta: Tensor = layer.get_delta_weight(adapter_name)  # type: ignore[attr-defined]
        return _sum(delta, weight)
    base = _base_parameter(layer.get_base_layer(), leaf)
    if not has_adapter:
        return base
    if leaf == "bias":
        extra = layer.lora_B[adapter_name].bias if layer.lora_bias.get(adapter_name) else None
        return base if extra is None else base + layer.scaling[adapter_name] * extra
    assert variant is not None
    try:
        return _upcast(variant.merge_safe(layer, adapter_name, base))
    except NotImplementedError as error:
        raise PatError(
            f"The LoRA variant {type(variant).__name__} on {name} has no merged form, so it cannot be folded into a "
            "smaller model; use plain LoRA or DoRA."
        ) from error


def _expert_parameter(wrapper: nn.Module, leaf: str, adapter_name: str) -> Tensor:
    """Walk the nested wrappers that adapt several bare parameters of one module."""
    delta: Tensor | None = None
    module = wrapper
    while isinstance(module, ParamWrapper):
        if module.parameter_name == leaf and adapter_name in module.lora_A:
            delta = module.get_delta_weight(adapter_name)
        module = module.base_layer
    base = getattr(module, leaf)
    return _upcast(base) if delta is None else _sum(delta, base)


def _base_parameter(module: nn.Module, leaf: str) -> Tensor:
    return _upcast(_dequantized(module) if leaf == "weight" else getattr(module, leaf))


def _dequantized(module: nn.Module) -> Tensor:
    stored = module.weight
    plain: Tensor = dequantize_module_weight(module)
    if module.weight is not stored:  # on a CPU, peft puts a copy of an 8-bit weight there that has lost its scales
        module.weight = stored
    return plain


def _factored(weight: Tensor, layer: LoraLayer, adapter_name: str) -> AdaptedMatrix:
    a, b = (whole(cast(nn.Linear, factor[adapter_name]).weight.detach()) for factor in (layer.lora_A, layer.lora_B))
    fine = torch.promote_types(b.dtype, torch.float32)
    return AdaptedMatrix(whole(weight.detach()), b.to(fine), a.to(fine), layer.scaling[adapter_name])


def _sum(delta: Tensor, base: Tensor) -> Tensor:
    """Add a base weight to LoRA's delta, in place."""
    dtype = torch.promote_types(torch.promote_types(base.dtype, delta.dtype), torch.float32)
    return whole(delta).to(dtype).add_(whole(base.detach()))


def _upcast(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to(torch.promote_types(tensor.dtype, torch.float32))
