"""Switching the pruning off, and nothing else of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def without_pruning(model: nn.Module) -> Iterator[None]:
    """Switch masks, gates and operators off and leave LoRA on: the model is then its base with LoRA merged.

    It does nothing to a model without a PAT adapter.
    """
    modules: list[Any] = list(model.modules())
    of_peft = [module for module in modules if isinstance(module, BaseTunerLayer) and not module.disable_adapters]
    layers: list[Any] = [layer for layer in of_peft if not isinstance(layer, LoraLayer)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    trained = [parameter.requires_grad for parameter in parameters]  # peft's switch decides on that as well
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, trains in zip(parameters, trained, strict=True):
            parameter.requires_grad_(trains)
