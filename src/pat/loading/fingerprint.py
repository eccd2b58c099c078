"""A base model's fingerprint: by it an adapter knows the weights that it was made for, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pat.errors import PatError
from pat.loading.sizes import COUNTS
from pat.loading.stored import stored_tensors
from pat.paths import looks_local

SAMPLE = 64
"""Number of bytes that are read at each place of a tensor."""

PLACES = 64
"""Places of every tensor that are read, evenly apart from its beginning to its end: a model that was trained differs in
all of them, and one of which some rows were changed most likely in one."""

MAX_PLACES = 2**16
"""Places that are read of all tensors together; of a model with very many (experts) each has fewer, three at least."""

SCHEME = "2:"
"""Begins every fingerprint of this form, so that one of another form is not taken for that of another model."""

_FIELDS = """
model_type tie_word_embeddings hidden_act hidden_activation rms_norm_eps use_post_norm attention_bias mlp_bias
layer_types mlp_layer_types no_rope_layers sliding_window use_sliding_window max_window_layers
use_bidirectional_attention attention_multiplier embedding_multiplier residual_multiplier logits_scaling
query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping norm_topk_prob
original_max_position_embeddings layer_rope_theta
"""

_OF_THE_ROPE = """
rope_type rope_theta partial_rotary_factor factor attention_factor beta_fast beta_slow mscale mscale_all_dim
short_factor long_factor low_freq_factor high_freq_factor truncate original_max_position_embeddings
"""

# The vocabulary is grown and trimmed in memory; the embedding's shape says how large it is.
DECISIVE = (*_FIELDS.split(), *(name for name in COUNTS if name != "vocab_size"))
"""Fields of a configuration that go in. All would be too many: another version of transformers adds some."""

ROTARY = tuple(_OF_THE_ROPE.split())
"""Fields of a rotary embedding that go in; some models have one for each kind of layer."""


def base_fingerprint(base_config: Any, name: str | None, *, revision: str | None = None) -> str | None:
    """Digest what decides a model's function: its configuration, and a little of each of its stored tensors.

    Neither the folder nor the way that tensors are spread over files goes in.

    Args:
        base_config: its configuration.
        name: folder or hub id of its files.
        revision: of the hub id.

    Returns:
        The scheme and 64 hexadecimal digits; None if there are no safetensors files of it on this machine.
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
            lines |= _samples(file, max(3, min(PLACES, MAX_PLACES // len(tensors))))
        for tensor in sorted(lines):
            digest.update(tensor.encode() + b"\0" + lines[tensor])
    except (PatError, OSError, ValueError, KeyError, struct.error):
        return None  # said where the model is loaded
    return SCHEME + digest.hexdigest()


def is_same(made_for: str | None, found: str | None) -> bool | None:
    """Tell whether two fingerprints are of one model; None if one is missing, or of a form that is not known here."""
    if made_for is None or found is None or not made_for.startswith(SCHEME):
        return None
    return made_for == found


def _facts(base_config: Any) -> dict[str, Any]:
    config = base_config.get_text_config()
    facts = {name: getattr(config, name, None) for name in DECISIVE}
    # Where another version of transformers adds a field, it is not set, or false.
    facts = {name: value for name, value in facts.items() if value is not None and value is not False}
    return facts | {"rope": _rotary(getattr(config, "rope_parameters", None) or {})}


def _rotary(given: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: _rotary(value) for name, value in given.items() if isinstance(value, Mapping)}
    return parts | {name: given[name] for name in ROTARY if given.get(name) is not None}


def _samples(file: Path, num_places: int) -> dict[str, bytes]:
    """Return dtype, shape and the bytes at some places of each tensor in a safetensors file."""
    found: dict[str, bytes] = {}
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            last = max(begin, end - SAMPLE)
            places = {begin + (last - begin) * number // (num_places - 1) for number in range(num_places)}
            parts = [f"{entry['dtype']} {entry['shape']}".encode()]
            for place in sorted(places):
                opened.seek(8 + size + place)
                parts.append(opened.read(min(SAMPLE, end - place)))
            found[name] = b"\0".join(parts)
    return found
