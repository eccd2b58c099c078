"""Rotary embeddings under the names of transformers 4, for engines that are built on it.

transformers 5 keeps everything in `rope_parameters`. transformers 4 does not know that field, reads `rope_theta` and
`rope_scaling` instead, and without them silently runs with a theta of 10,000 and no scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

_OF_ITS_OWN = frozenset({"rope_theta", "partial_rotary_factor"})
"""Parameters that transformers 4 has beside the scaling, not in it."""

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Layer types that transformers 4 knows a rotary embedding of its own for."""


def legacy_rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a `config.json` that tell transformers 4 what `rope_parameters` tells transformers 5.

    transformers 5 reads a file with both alike.
    """
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        local = parameters.get(LOCAL) or {}
        parameters = parameters.get(GLOBAL) or local
        fields = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    else:
        fields = {}
    fields |= {name: parameters[name] for name in _OF_ITS_OWN if parameters.get(name) is not None}
    if not parameters:
        return {}
    scaling = {name: value for name, value in parameters.items() if name not in _OF_ITS_OWN}
    positions = getattr(config, "max_position_embeddings", None)
    if scaling.get("original_max_position_embeddings") == positions and "factor" in scaling:
        # Filled in by transformers 5 where the checkpoint has none; transformers 4 would take it for a factor of 1.
        del scaling["original_max_position_embeddings"]
    # A null would not say the same: some configurations of transformers 5 take it for no `rope_parameters` at all.
    return fields | ({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {})
