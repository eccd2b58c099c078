"""Rotary embeddings under the names of transformers 4, for engines that are built on it.

transformers 5 keeps everything in `rope_parameters`. transformers 4 does not know that field, reads `rope_theta` and
`rope_scaling` instead, and without them silently runs with a theta of 10,000 and no scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from pat.families import FAMILIES

_OF_ITS_OWN = frozenset({"rope_theta", "partial_rotary_factor"})
"""Parameters that transformers 4 has beside the scaling, not in it."""

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Layer types that transformers 4 knows a rotary embedding of its own for."""

_LENGTH = "original_max_position_embeddings"

_LENGTH_MAY_BE_FILLED_IN = ("yarn", "longrope")
"""Types of which transformers 5 fills in the original length where the checkpoint has none: that of the model, as
transformers 4 does for itself. Written down, releases of transformers 4 would take it for a factor of 1."""

_LENGTH_BESIDE_THE_SCALING = ("longrope",)
"""Types whose original length transformers 4 reads from the configuration itself, and not from its scaling."""


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
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        # A null would not say the same: some configurations of transformers 5 take it for no `rope_parameters` at all.
        return fields
    length = scaling.get(_LENGTH)
    is_filled_in = length == getattr(config, "max_position_embeddings", None) and "factor" in scaling
    if is_filled_in and kind in _LENGTH_MAY_BE_FILLED_IN:
        del scaling[_LENGTH]
    elif length is not None and kind in _LENGTH_BESIDE_THE_SCALING:
        fields[_LENGTH] = length
    family = FAMILIES.get(config.model_type)
    keys = family.legacy_rope_keys if family else ()
    # What else a scaling may say has no words there: it is left in, and refused, instead of passed over.
    if keys and scaling.keys() <= {*keys, "rope_type", _LENGTH}:
        scaling = {name: ({"type": kind} | scaling)[name] for name in keys}
    return fields | {"rope_scaling": scaling}


def rope_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return a configuration's `rope_parameters` without `type`, the first name of `rope_type`; None without any."""
    parameters: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    return None if parameters is None else {name: value for name, value in parameters.items() if name != "type"}


def rope_of_any_width(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` without scaling where that has a factor for each channel of a head (longrope).

    Args:
        parameters: those of a model, or of each type of layer.
    """
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return {name: rope_of_any_width(v) if isinstance(v, Mapping) else v for name, v in parameters.items()}
    if not any(isinstance(value, list) for value in parameters.values()):
        return dict(parameters)
    return {"rope_type": "default"} | {name: v for name, v in parameters.items() if name in _OF_ITS_OWN}
