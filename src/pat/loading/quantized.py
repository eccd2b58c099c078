"""Quantised bases: their weights are kept in a layout that can be trained on, and their quantisation is recorded."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from pat.errors import PatError


def keep_plain_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on processors with AVX512-BF16.

    bitsandbytes 0.50 does that in place at the first forward pass in eval mode (a calibration, an evaluation). It
    refuses outputs that are no multiple of 32 and inputs that are no multiple of 64, lets no gradient through
    afterwards, and dequantises the packed weights wrongly; without nested statistics it cannot even undo it.

    Raises:
        PatError: it has happened already.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        layer = cast(Any, module)
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise PatError(
                "The 4-bit base model has been run before, and bitsandbytes has repacked its weights for inference on "
                "this processor; load it again and attach the adapter before using it."
            )
        layer.support_avx512bf16_for_cpu = False


def quantization_of(base_config: Any) -> dict[str, Any] | None:
    """Return a model's quantisation as plain values, None if it has none."""
    quantization = getattr(base_config, "quantization_config", None)
    if quantization is None or isinstance(quantization, dict):
        return quantization
    return cast(dict[str, Any], quantization.to_dict())
