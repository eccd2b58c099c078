"""Adapters of the published code of the PAT paper: what their files hold.

Beside peft's LoRA they have tensors for each place at which the residual stream is written: `dimdown0` of the model
behind the embedding, `dimdown0` and `dimdown1` of each layer behind attention and MLP. These are two matrices,
`dimdown_inout.1` L1 `(d, r)` and `dimdown_inout.0` L0 `(r, d)`, and, of a training with identity loss, a scale
`dimdown_scale` s `(1, d)`. A trained mask is one vector `dimdown_mask.mask` `(1, 1, d)` at the embedding, whose
positive entries are the channels that stay; a frozen one, which keeps the first channels, leaves no tensor. Such a
place computes

    z = s * m * (y + L1 (L0 y))

with the mask m of 0 and 1. (The paper has the scale inside the product, `diag(v)`, and none behind it.)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pat.errors import PatError, one_line
from pat.kinds import misfits
from pat.loading.stored import DTYPES
from pat.named import PUBLISHED, check_adapter

PREFIX = "base_model.model."

_PLACE = re.compile(r"model\.(?:layers\.(?P<layer>\d+)\.)?dimdown(?P<branch>[01])\.(?P<part>dimdown_\w+(?:\.\w+)*)")

_PARTS = {
    "dimdown_inout.0.weight": "down",
    "dimdown_inout.1.weight": "up",
    "dimdown_scale.weight": "scale",
    "dimdown_mask.mask": "mask",
}


@dataclass(frozen=True)
class Place:
    """Tensors by which the published code changes one summand of the residual stream."""

    down: Tensor
    """L0 `(r, d)`."""
    up: Tensor
    """L1 `(d, r)`."""
    scale: Tensor | None
    """s `(d,)`, None without one."""

    def matrix(self, keep: Tensor) -> Tensor:
        """Return `diag(s * m) (I + L1 L0)` in float64, `(d, d)`.

        Args:
            keep: the mask m, boolean `(d,)`.
        """
        whole = torch.eye(len(keep), dtype=torch.float64) + self.up.double() @ self.down.double()
        scale = torch.ones(len(keep), dtype=torch.float64) if self.scale is None else self.scale.double()
        return (scale * keep).unsqueeze(1) * whole


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter of the published code."""

    config: dict[str, Any]
    """Its configuration, of peft 0.10 for LoRA."""
    places: dict[tuple[int, int], Place]
    """Places by (layer, branch), the embedding's being (-1, 0); attention is branch 0, the MLP branch 1."""
    mask: Tensor | None
    """Trained weights of the mask, `(d,)`; None if it was frozen."""
    lora: dict[str, Tensor]
    """LoRA's tensors by the names that peft gives them."""

    @property
    def hidden_size(self) -> int:
        """d, the number of channels that it was made for."""
        return self.places[(-1, 0)].up.shape[0]

    def keep(self, num_kept: int | None) -> Tensor:
        """Return the mask m, boolean `(d,)`.

        Args:
            num_kept: number of channels that a frozen mask keeps; None for a trained one, which says so itself.

        Raises:
            PatError: the number is needed and missing, or not needed and another, or nothing stays.
        """
        if self.mask is None:
            if num_kept is None or not 0 < num_kept <= self.hidden_size:
                raise PatError(
                    f"Got pruned_hidden_size={num_kept} for an adapter with a frozen mask, which does not say how many "
                    f"channels it keeps; expected the dimdown_dim of its training, at most {self.hidden_size}."
                )
            return torch.arange(self.hidden_size) < num_kept
        keep = self.mask > 0  # 0 is cut: that code rounds a sigmoid of 0.5 to 0
        found = int(keep.sum())
        if num_kept not in (None, found):
            raise PatError(f"Got pruned_hidden_size={num_kept}, but the adapter's mask keeps {found}; leave it out.")
        if found == 0:
            raise PatError("Got an adapter whose mask keeps no channel; it was most likely not trained to the end.")
        return keep


def read_published(adapter: str | Path) -> PublishedAdapter:
    """Read an adapter of the published code.

    Raises:
        PatError: no such folder, or its files are not those of such an adapter.
    """
    folder = check_adapter(adapter, PUBLISHED)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise PatError(f"{adapter}: has no {name}; expected what the published code's training has saved.")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise PatError(f"{folder / CONFIG_NAME}: not readable as JSON ({one_line(error)}).") from error
    if not isinstance(config, dict):
        raise PatError(f"{folder / CONFIG_NAME}: holds no JSON object; expected the configuration of an adapter.")
    if (wrong := misfits(config, LoraConfig)) is not None:
        raise PatError(f"{folder / CONFIG_NAME}: {wrong}.")
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise PatError(f"{folder / SAFETENSORS_WEIGHTS_NAME}: not readable ({one_line(error)}).") from error
    return _sorted(folder, config, tensors)


def _sorted(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> PublishedAdapter:
    lora: dict[str, Tensor] = {}
    parts: dict[tuple[int, int], dict[str, Tensor]] = {}
    mask = None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise PatError(f"{folder}: its tensor {name} holds {tensor.dtype}; expected numbers of 16 bits or more.")
        if not tensor.isfinite().all():
            raise PatError(f"{folder}: its tensor {name} holds numbers that are not finite; the training has diverged.")
        found = _PLACE.fullmatch(name.removeprefix(PREFIX))
        part = _PARTS.get(found["part"]) if found else None
        is_odd = found is not None and part == "mask" and found["layer"] is not None  # one mask serves all places
        if found is None or part is None or is_odd:
            if "dimdown" in name or ".lora_" not in name:
                raise PatError(f"{folder}: has the tensor {name}, which the published code does not write.")
            lora[name] = tensor
        elif part == "mask":
            mask = tensor.flatten()
        else:
            key = (-1 if found["layer"] is None else int(found["layer"]), int(found["branch"]))
            parts.setdefault(key, {})[part] = tensor.flatten() if part == "scale" else tensor
    if (-1, 0) not in parts:
        raise PatError(
            f"{folder}: has no dimdown tensors of an embedding, so it is not an adapter of the published code of PAT; "
            "`pat merge` takes those of this package."
        )
    of_embedding = parts[(-1, 0)].get("up")
    size = 0 if of_embedding is None or of_embedding.dim() == 0 else of_embedding.shape[0]
    places = {}
    for key, found_parts in parts.items():
        where = "the embedding" if key[0] < 0 else f"dimdown{key[1]} of layer {key[0]}"
        if missing := {"down", "up"} - set(found_parts):
            raise PatError(f"{folder}: lacks a matrix ({', '.join(sorted(missing))}) at {where}; it is not complete.")
        places[key] = Place(found_parts["down"], found_parts["up"], found_parts.get("scale"))
        _check_shapes(folder, where, places[key], size)
    if mask is not None and len(mask) != len(places[(-1, 0)].up):
        raise PatError(f"{folder}: its mask has {len(mask)} channels, its matrices {len(places[(-1, 0)].up)}.")
    return PublishedAdapter(config, places, mask, lora)


def _check_shapes(folder: Path, where: str, place: Place, size: int) -> None:
    rank = place.down.shape[0] if place.down.dim() else 0
    expected = ((rank, size), (size, rank), (size,))
    given = (place.down.shape, place.up.shape, (size,) if place.scale is None else place.scale.shape)
    if tuple(map(tuple, given)) != expected:
        shown = ", ".join(str(tuple(cast(Any, shape))) for shape in given)
        raise PatError(f"{folder}: has matrices of shapes {shown} at {where}; expected {expected}.")
