"""A base model's fingerprint: by it an adapter knows the weights that it was made for, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from pat.errors import PatError
from pat.loading.sizes import COUNTS
from pat.loading.stored import stored_tensors
from pat.paths import looks_local

SAMPLE = 64
"""Bytes read at the beginning, middle and end of every tensor; one that was trained differs in all of them."""

_DECISIVE = (
    "model_type",
    *(name for name in COUNTS if name != "vocab_size"),  # grown and trimmed in memory; the embedding's shape says it
    "tie_word_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
)
"""Fields of a configuration that go in. All would be too many: another version of transformers adds some."""


def base_fingerprint(base_config: Any, name: str | None, *, revision: str | None = None) -> str | None:
    """Digest what decides a model's function: its configuration, and a little of each of its stored tensors.

    Neither the folder nor the way that tensors are spread over files goes in.

    Args:
        base_config: its configuration.
        name: folder or hub id of its files.
        revision: of the hub id.

    Returns:
        64 hexadecimal digits; None if there are no safetensors files of it on this machine.
    """
    if not name or (looks_local(name) and not os.path.isdir(name)):
        return None
    try:
        tensors = stored_tensors(name, revision=revision)
        if tensors is None:
            return None
        digest = hashlib.sha256(json.dumps(_facts(base_config), sort_keys=True).encode())
        lines: dict[str, bytes] = {}
        for file in {tensor.file for tensor in tensors.values()}:
            lines |= _samples(file)
        for tensor in sorted(lines):
            digest.update(tensor.encode() + b"\0" + lines[tensor])
    except (PatError, OSError, ValueError, KeyError, struct.error):
        return None  # said where the model is loaded
    return digest.hexdigest()


def _facts(base_config: Any) -> dict[str, Any]:
    facts = {name: getattr(base_config, name, None) for name in _DECISIVE}
    if facts["rope_theta"] is None:  # newer versions of transformers have moved it
        rope = getattr(base_config, "rope_parameters", None) or {}
        facts["rope_theta"] = rope.get("rope_theta")
    return facts


def _samples(file: Path) -> dict[str, bytes]:
    """Return dtype, shape and a few bytes of each tensor in a safetensors file."""
    found: dict[str, bytes] = {}
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            places = {begin, max(begin, (begin + end) // 2), max(begin, end - SAMPLE)}
            parts = [f"{entry['dtype']} {entry['shape']}".encode()]
            for place in sorted(places):
                opened.seek(8 + size + place)
                parts.append(opened.read(min(SAMPLE, end - place)))
            found[name] = b"\0".join(parts)
    return found
