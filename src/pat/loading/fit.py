"""Hold the stored weights of a model against its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from pat.errors import PatError
from pat.families import Family
from pat.loading.quantized import quantization_of
from pat.loading.sizes import COUNTS
from pat.loading.stored import StoredTensor


def too_few_layers(name: str, left_over: Sequence[str], config: Any) -> PatError:
    """Return the error for a checkpoint with tensors of layers that its configuration does not have."""
    return PatError(
        f"The weights of the model {name!r} hold {len(left_over)} tensors that its configuration has no place for, "
        f"such as {left_over[0]}, with num_hidden_layers={config.num_hidden_layers}; correct its config.json."
    )


def check_weights(model_name: str, model: PreTrainedModel, family: Family, stored: Mapping[str, StoredTensor]) -> None:
    """Hold the weights on this machine against the configuration: layers, shapes, and whether they are plain numbers.

    Raises:
        PatError: they do not fit.
    """
    quantised = quantization_of(model.config) is not None
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if name in stored]
    layers = f"{family.layers}."
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    beyond = [
        name
        for name in sorted(stored)
        if name.startswith(layers)
        and (number := name.removeprefix(layers).partition(".")[0]).isdecimal()
        and int(number) >= model.config.num_hidden_layers
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if beyond:
        raise too_few_layers(model_name, beyond, model.config)
    plain = [stored[name].dtype is not None for name, _ in parameters]
    if quantised and plain and all(plain):
        raise PatError(
            f"The configuration of the model {model_name!r} is not usable: it has a quantization_config, but the "
            "weights are not quantised; take it out of config.json (and quantise while loading, by --load_in_4bit)."
        )
    for parameter_name, parameter in () if quantised else parameters:
        found = stored[parameter_name]
        if found.dtype is None:
            raise PatError(
                f"The weights of the model {model_name!r}, such as {parameter_name}, are not plain numbers of 16 bits "
                "or more, and its configuration does not say how they are quantised; take the checkpoint it was made "
                "from."
            )
        if found.shape != tuple(parameter.shape):
            sizes = set(parameter.shape) - set(found.shape)
            said = [field for field in COUNTS if getattr(model.config, field, None) in sizes]
            values = ", ".join(f"{field}={getattr(model.config, field)}" for field in said)
            raise PatError(
                f"The weights of the model {model_name!r} do not fit its configuration: {parameter_name} has the shape "
                f"{found.shape}, expected {tuple(parameter.shape)}{' by ' + values if values else ''}."
            )
