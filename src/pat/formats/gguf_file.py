"""Write a model's weights as a GGUF file, and read them back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pat.errors import PatError
from pat.file_sizes.gguf_layout import GgufLayout, GgufTensor
from pat.file_sizes.gguf_types import Quantization

_LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127}
"""Largest number of each type; the scale of a block of Q8_0, a 127th of its largest number, is a float16."""


def write_gguf(layout: GgufLayout, weights: Mapping[str, Tensor], path: Path, kind: Quantization) -> None:
    """Write a file; one tensor at a time is converted.

    Args:
        layout: what it holds, see `layout_of`.
        weights: the model's tensors by name, see `model_tensors`.
        path: where to write.
        kind: a kind whose types the `gguf` package can make: plain numbers, or Q8_0.

    Raises:
        PatError: a number is too large for its type, and would be infinite in the file.
    """
    import gguf  # an extra

    writer = gguf.GGUFWriter(path, layout.architecture)  # which writes general.architecture itself
    forms = gguf.GGUFValueType
    kinds = {"u32": forms.UINT32, "f32": forms.FLOAT32, "i32": forms.INT32, "bool": forms.BOOL, "str": forms.STRING}
    for entry in layout.metadata[1:]:
        if entry.kind.startswith("["):
            writer.add_key_value(entry.key, entry.value, forms.ARRAY, kinds[entry.kind[1:-1]])
        else:
            writer.add_key_value(entry.key, entry.value, kinds[entry.kind])
    types = {tensor.name: gguf.GGMLQuantizationType[layout.type_of(tensor, kind).name] for tensor in layout.tensors}
    for tensor in layout.tensors:
        size = layout.type_of(tensor, kind).size(tensor.shape)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("float32"), size, raw_dtype=types[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in layout.tensors:
        values, type_name = _values(tensor, weights), types[tensor.name].name
        if (largest := float(np.abs(values).max(initial=0))) > _LARGEST.get(type_name, math.inf):
            raise PatError(
                f"Got a model with numbers up to {largest:.3g} in {tensor.source}, too large for {type_name}; give "
                "--quantize BF16 or F32."
            )
        writer.write_tensor_data(gguf.quants.quantize(values, types[tensor.name]))
    writer.close()


@torch.no_grad()
def read_gguf(layout: GgufLayout, path: Path, weights: Mapping[str, Tensor]) -> None:
    """Put the numbers that the blocks of a file stand for in place of a model's weights.

    Args:
        layout: what the file holds, see `layout_of`.
        path: the file.
        weights: the model's tensors by name, see `model_tensors`; they are written over.
    """
    import gguf  # an extra

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in layout.tensors:
        if tensor.values is not None:
            continue
        found = stored[tensor.name]
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).reshape(tensor.shape)
        if tensor.num_heads is not None:
            pairs = values.reshape(tensor.num_heads, -1, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(tensor.shape)
        weight = weights[tensor.source]
        place = weight if tensor.half is None else weight.chunk(2, dim=1)[tensor.half]
        place.copy_(values - tensor.offset)


@torch.no_grad()
def _values(tensor: GgufTensor, weights: Mapping[str, Tensor]) -> Any:
    """Return a tensor's values as a float32 array."""
    if tensor.values is not None:
        return torch.tensor(tensor.values, dtype=torch.float32).numpy()
    weight = weights[tensor.source].detach().cpu().float()
    if tensor.half is not None:
        weight = weight.chunk(2, dim=1)[tensor.half]
    if tensor.num_heads is not None:
        # From the halves of a head, which transformers rotates against each other, to neighbouring channels.
        halves = weight.reshape(tensor.num_heads, 2, -1, *weight.shape[1:])
        weight = halves.transpose(1, 2).reshape(weight.shape)
    return (weight + tensor.offset if tensor.offset else weight).contiguous().numpy()
