"""Checks that a saved adapter is what it was when it was made, and that its base is the one it was made for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig

from pat.checkpoint.card import shown_name
from pat.checkpoint.compact import check_compact, compaction_of
from pat.errors import PatError
from pat.families import FAMILIES
from pat.kinds import misfits
from pat.loading import base_fingerprint
from pat.loading.fingerprint import SCHEME, is_same
from pat.loading.stored import DTYPES
from pat.tuner import PatConfig
from pat.tuner.model import find_tuner
from pat.tuner.weights import PREFIX

logger = logging.getLogger(__name__)

_PEFTS_OWN = {"auto_mapping", "peft_version", "runtime_config"}
"""Keys that peft writes without a field, and those that say nothing about the function."""

_ENDS = {path.rpartition(".")[2] for family in FAMILIES.values() for path in (family.embedding, family.head)}

_COUNTS = {"keep": ("BOOL",), "pinned": ("BOOL",), "fitted": ("BOOL",), "progress": ("I64",)}
"""Dtypes, as headers name them, of a gate's buffers that are no real numbers."""

_WAYS_TO_HOLD = ("base_layer", "original_module", "token_adapter")
"""Modules of peft's that hold an embedding of the base inside an adapted one."""


def check_keys(file: Path, stored: Mapping[str, Any], config_class: type[LoraConfig]) -> None:
    """Refuse keys of an adapter's configuration that would be passed over, unless they are set to nothing.

    Raises:
        PatError: there are some, which may decide what the adapter computes, or a value is of another kind than its
            field.
    """
    known = {field.name for field in fields(config_class)} | _PEFTS_OWN
    unknown = sorted(name for name, value in stored.items() if name not in known and value not in (None, False, [], {}))
    if unknown:
        raise PatError(
            f"{file}: got {len(unknown)} unknown keys ({', '.join(unknown)[:200]}), which may decide what the adapter "
            "computes; expected those of this version of peft and pat: use the versions that it was made with."
        )
    if (wrong := misfits(stored, config_class)) is not None:
        raise PatError(f"{file}: {wrong}.")


def check_base(
    adapter: str | os.PathLike[str],
    config: LoraConfig,
    base_config: PretrainedConfig,
    name: str,
    *,
    revision: str | None = None,
) -> None:
    """Refuse a base that has the shape but not the function of the one that an adapter was made for.

    Raises:
        PatError: its fingerprint is another one.
    """
    if not isinstance(config, PatConfig):
        if (compaction := compaction_of(adapter)) is not None:
            remedy = "Expected the compact model of its run; put that back, or pass it with --base_model."
            check_compact(compaction, base_config, name, remedy=remedy)
        return
    made_for = config.base_fingerprint
    found = base_fingerprint(base_config, name, revision=revision)
    if made_for is None or not made_for.startswith(SCHEME):
        logger.warning(
            "%s does not say, or not in a form that is known here, which base it was made for (it is of another "
            "version, or of a base that was not on disk as safetensors), so that any base of the same shape is taken.",
            adapter,
        )
    elif is_same(made_for, found) is False:
        raise PatError(
            f"The adapter {adapter} does not fit the base model {shown_name(name)}: it was made for a model with the "
            f"fingerprint …{made_for[-8:]}, this one has …{str(found)[-8:]}, by other weights or another "
            "configuration. Expected the base it was trained on; pass it with --base_model."
        )


def check_tensors(model: PeftModel, adapter: str | os.PathLike[str]) -> None:
    """Refuse an adapter file that is not just what the adapter's configuration makes of the base.

    peft leaves a tensor that is missing at its initial value, and passes over one that has no place.

    Raises:
        PatError: tensors are missing, left over or of another kind of number, or a gate keeps another number of
            channels than it should.
    """
    expected, dtypes = set(get_peft_model_state_dict(model, save_embedding_layers=False)), _dtypes(adapter)
    stored = set(dtypes)
    if missing := expected - stored:
        raise PatError(
            f"{adapter}: lacks {len(missing)} of {len(expected)} tensors, such as {min(missing)}; the adapter is not "
            "complete, or made by another version, or its configuration was changed."
        )
    if left_over := {name for name in stored - expected if not _is_of_the_base(name, model.active_peft_config)}:
        raise PatError(
            f"{adapter}: has {len(left_over)} tensors that its configuration has no place for, such as "
            f"{min(left_over)}; expected {len(expected)}: one of the two was changed after the adapter was made."
        )
    for name, dtype in dtypes.items():
        wanted = _COUNTS.get(name.rpartition(".")[2], DTYPES)
        if dtype not in wanted:
            raise PatError(f"{adapter}: its tensor {name} holds {dtype}; expected {' or '.join(wanted)}.")
    tuner = find_tuner(model)
    for gate in () if tuner is None else tuner.all_gates():
        gate.check_kept(f"{adapter}:")


def carries_base_weights(adapter: str | os.PathLike[str], config: LoraConfig) -> bool:
    """Tell whether an adapter brings weights of the base.

    peft saves them where LoRA is on the embedding, where that was resized, and where it is asked to.
    """
    return any(
        (".base_layer." in name and PREFIX not in name) or _is_written_along(name, config) for name in _dtypes(adapter)
    )


def _dtypes(adapter: str | os.PathLike[str]) -> dict[str, str]:
    """Return the dtypes of an adapter's tensors by their names, as the header of its file has them."""
    with safe_open(Path(adapter) / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no mapping


def check_written_along(base: nn.Module, adapter: str | os.PathLike[str], config: LoraConfig) -> None:
    """Refuse an adapter that holds an embedding or a head other than the base's, which it does not say it trains.

    Raises:
        PatError: one is another.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    with safe_open(Path(adapter) / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        for name in file.keys():  # noqa: SIM118  no mapping
            if not _is_written_along(name, config):
                continue
            own, stored = parameters.get(name.removeprefix("base_model.model.")), file.get_tensor(name)
            if own is None or stored.shape != own.shape or not torch.equal(stored.to(own.dtype), own.detach().cpu()):
                raise PatError(
                    f"{adapter}: its tensor {name} is not the base's, and its configuration does not train it; "
                    "expected the base whose embedding it was made with: save that one, and pass it with --base_model."
                )


def _is_written_along(name: str, config: LoraConfig) -> bool:
    """Tell whether a tensor is an embedding or a head as it is, which the adapter does not train."""
    if config.trainable_token_indices is not None:
        return False  # of these all of the embedding is written, and read again
    *_, module, leaf = ("", *name.split("."))
    trained = _ENDS & set(config.modules_to_save or ())
    if trained and config.ensure_weight_tying:
        trained = _ENDS
    return leaf == "weight" and module in _ENDS - trained


def _is_of_the_base(name: str, config: LoraConfig) -> bool:
    """Tell whether peft has written a tensor because it writes all of an embedding that LoRA or new tokens are on."""
    *owners, leaf = name.split(".")
    if _is_written_along(name, config):
        return True
    if config.trainable_token_indices is not None and _ENDS & set(owners):
        return True  # all that there is below, once more
    outer = [owner for owner in owners if owner not in _WAYS_TO_HOLD]
    return leaf == "weight" and outer != owners and bool(outer) and outer[-1] in _ENDS
