"""A copy of the base model that a method may compute in and change."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def float32_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in eval mode with trainable float32 parameters and no gradients."""
    work = copy.deepcopy(model)
    work.eval()
    set_dtype(work, torch.float32)
    for parameter in work.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point())
    return work


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters alone: buffers such as the frequencies of rotary embeddings must keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
