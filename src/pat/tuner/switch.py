"""Switching the pruning off, and nothing else of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pat.tuner.layer import PruningLayer


@contextmanager
def without_pruning(model: nn.Module) -> Iterator[None]:
    """Switch masks, gates and operators off and leave LoRA on: the model is then its base with LoRA merged.

    It does nothing to a model without a PAT adapter.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PruningLayer) and not layer.disable_adapters]
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
