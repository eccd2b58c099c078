"""Digests of all that a score depends on: the model, its tokenizer and the questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from pat.questions.hub import Row

SAMPLED_VALUES = 4096
"""Values of each parameter that go into a model's fingerprint, at least; smaller ones are read whole."""


def fingerprint_rows(rows: Iterable[Row]) -> str:
    """Return a digest of questions."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """Return a digest of a model.

    It covers its class and configuration, the names, shapes, types and a sample of the values of its tensors, and which
    adapters are on at which scale.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(config.to_json_string().encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = tensor.detach().reshape(-1)[:: _stride(tensor.numel(), tensor.shape[-1] if tensor.ndim else 1)]
        if sample.is_floating_point():
            sample = sample.float()  # numpy knows no bfloat16
        digest.update(sample.cpu().contiguous().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            scaling = {adapter: getattr(module, "scaling", {}).get(adapter) for adapter in module.active_adapters}
            digest.update(f"{name} {module.disable_adapters} {module.merged_adapters} {scaling}".encode())
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of how a tokenizer reads text; how it pads and cuts changes with every call, and is left out."""
    digest = hashlib.sha256(repr(sorted(map(str, tokenizer.special_tokens_map.items()))).encode())
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        state = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        for name in ("padding", "truncation"):
            state.pop(name, None)
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _stride(num_values: int, row_length: int) -> int:
    """Return how far apart the sampled values lie: 1, or an odd prime that does not divide a row.

    A divisor of the row's length would read the same few columns of every row.
    """
    stride = num_values // SAMPLED_VALUES
    if stride < 3:
        return 1
    while not _is_prime(stride) or row_length % stride == 0:
        stride -= 1
        if stride < 3:
            return 1
    return stride


def _is_prime(number: int) -> bool:
    return number % 2 == 1 and all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))
