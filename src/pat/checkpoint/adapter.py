"""A saved adapter: what its folder says, and how it gets onto its base model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from pat.checkpoint.compact import compaction_of
from pat.checkpoint.fitting import check_readable, check_values, fitting
from pat.checkpoint.hollow import StoredWeights, hollow_model
from pat.checkpoint.layout import UnknownLayoutError
from pat.checkpoint.places import ADAPTER, COMPACT, MODEL, RECORD
from pat.checkpoint.trust import carries_base_weights, check_base, check_keys, check_tensors, check_written_along
from pat.errors import PatError, one_line
from pat.loading import (
    grow_embedding,
    grown_rows,
    load_base,
    load_config,
    quantization_of,
)
from pat.loading.stored import dtype_of, stored_tensors
from pat.loading.tokenizer import load_plain_tokenizer
from pat.loading.trimming import kept_tokens, renumber_specials, trim_embedding
from pat.named import check_adapter
from pat.paths import expand, looks_local
from pat.report.progress import quiet_transformers
from pat.tuner import PatConfig
from pat.tuner.config import PatType
from pat.tuner.prepare import check_config

_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Initialisations of LoRA that leave the base model's weights as they are."""


def read_adapter_config(adapter: str | os.PathLike[str]) -> LoraConfig:
    """Read the configuration of a saved PAT adapter, or of the ordinary LoRA adapter of a compact model.

    Raises:
        PatError: no such folder, no adapter in it, one of another method, or one whose files cannot be used.
    """
    folder = check_adapter(adapter)
    if not (folder / CONFIG_NAME).is_file():
        inner = next((n for n in (f"{COMPACT}/{ADAPTER}", ADAPTER) if (folder / n / CONFIG_NAME).is_file()), None)
        hint = f"pass {folder / inner}" if inner else "pass what model.save_pretrained or `pat tune` wrote as adapter"
        if not inner and (folder / "config.json").is_file():
            hint = "it holds a model, and a model needs no merge"
        raise PatError(f"{adapter}: has no {CONFIG_NAME}, so it is not the folder of an adapter; {hint}.")
    try:
        stored = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        kind = stored.get("peft_type")
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise PatError(f"{folder / CONFIG_NAME}: not readable as JSON ({one_line(error)}).") from error
    config_class = PatConfig if kind == PatType.PAT else LoraConfig
    check_keys(folder / CONFIG_NAME, stored, config_class)
    if kind != PatType.PAT and not (kind == PeftType.LORA.value and compaction_of(adapter) is not None):
        raise PatError(
            f"{adapter}: is an adapter of type {kind}, expected PAT; peft's own merge_and_unload merges others."
        )
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise PatError(f"{adapter}: has no {SAFETENSORS_WEIGHTS_NAME}; the adapter was not saved completely.")
    check_readable(folder)
    try:
        config = cast(LoraConfig, config_class.from_pretrained(str(folder)))
        check_values(config)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise PatError(f"{folder / CONFIG_NAME}: not a usable configuration ({one_line(error)}).") from error
    return config


def base_of(adapter: str | os.PathLike[str], config: LoraConfig, base_model: str | None) -> tuple[str, str | None]:
    """Return the base model to put an adapter on: the one given, the compact one beside the adapter, or the recorded.

    Returns:
        Its name, and the revision to take of it: the recorded one, if it is the recorded model.

    Raises:
        PatError: none is given and none recorded, or the recorded folder is gone.
    """
    recorded = expand(config.base_model_name_or_path or "")
    if base_model is not None:
        return base_model, config.revision if base_model == recorded else None
    beside = Path(adapter).resolve().parent / MODEL
    if not isinstance(config, PatConfig) and beside.is_dir() and (beside.parent / RECORD).is_file():
        return str(beside), None
    if not recorded:
        raise PatError(f"{adapter}: does not say which base model it belongs to; pass --base_model.")
    if looks_local(recorded) and not os.path.isdir(recorded):
        raise PatError(
            f"{adapter}: belongs to the base model in {config.base_model_name_or_path}, which is not there; pass "
            "--base_model with its folder or hub id."
        )
    return recorded, config.revision


def base_config_for(
    adapter: str | os.PathLike[str], config: LoraConfig, name: str, *, revision: str | None = None
) -> tuple[PretrainedConfig, bool]:
    """Return the configuration of the base that an adapter is put on, and whether its embedding has to change first.

    It has to if the adapter trains tokens that were added for it, or was made for a trimmed vocabulary.

    Raises:
        PatError: see `load_config`, or the adapter was made for another base.
    """
    try:
        base_config, family = load_config(name, revision=revision)
    except PatError as error:
        if os.path.isdir(name) or name != expand(config.base_model_name_or_path or ""):
            raise
        raise PatError(f"{error} That is the base of {adapter}; --base_model says where it lies now.") from error
    kept = _kept_tokens(adapter, config, name, base_config, revision=revision)
    if kept is not None:
        base_config.vocab_size = len(kept)
        renumber_specials(base_config, kept)
    indices = config.trainable_token_indices or []
    listed = [index for part in (indices.values() if isinstance(indices, dict) else [indices]) for index in part]
    num_stored, grown = base_config.vocab_size, grown_rows(base_config.vocab_size, max(listed, default=0))
    made_for = (config.base_shape or {}).get("vocab_size") if isinstance(config, PatConfig) else None
    if made_for in (None, grown):  # an embedding that was resized in another way cannot be made again
        base_config.vocab_size = grown
    if isinstance(config, PatConfig):
        check_config(base_config, family, config)
    return base_config, kept is not None or base_config.vocab_size > num_stored


def _kept_tokens(
    adapter: str | os.PathLike[str],
    config: LoraConfig,
    name: str,
    base_config: PretrainedConfig,
    *,
    revision: str | None = None,
) -> list[int] | None:
    """Return the ids, in the base, of the trimmed vocabulary that an adapter was made for; None if it was not.

    The adapter's tokenizer is the trimmed one, so that the tokens' names tell the ids.
    """
    if not isinstance(config, PatConfig) or config.base_vocab_size != base_config.vocab_size:
        return None  # a base of another size is refused like any other that does not fit
    return kept_tokens(load_plain_tokenizer(name, revision=revision), load_plain_tokenizer(str(adapter)))


def load_hollow(
    adapter: str | os.PathLike[str],
    name: str,
    config: LoraConfig,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[PeftModel, StoredWeights] | None:
    """Put a saved adapter on a base model that stays on disk, None if that base or adapter has to be in memory.

    That is so for bases that are quantised or not stored as safetensors, for variants of LoRA that change the base or
    look at it when they are put on it, for adapters that carry weights of the base (LoRA on the embedding) or train
    tokens that it has not, and for trimmed vocabularies.

    Raises:
        PatError: adapter or base cannot be read, or do not fit each other.
    """
    base_config, changes = base_config_for(adapter, config, name, revision=revision)
    quantised = quantization_of(base_config) is not None or getattr(config, "base_quantization", None) is not None
    looks_at_base = config.kasa_config is not None or config.monteclora_config is not None
    if changes or quantised or looks_at_base or config.init_lora_weights not in _INITIALISATIONS:
        return None
    with fitting(name, adapter, config, base_config, revision):
        if carries_base_weights(adapter, config):
            return None
    tensors = stored_tensors(name, revision=revision, download=True)
    if tensors is None:
        return None
    dtype = dtype_of(tensors) or torch.float32
    base = hollow_model(base_config, dtype, torch.device(device))
    try:
        stored = StoredWeights(base, tensors, name)
    except UnknownLayoutError:
        return None
    # peft rounds an adapter to the dtype of the layer it is loaded beside.
    fine = torch.promote_types(dtype, torch.float32)
    with quiet_transformers(), fitting(name, adapter, config, base_config, revision), stored.as_dtype(fine):
        folder = str(Path(adapter))
        model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True, torch_device=str(device))
        check_tensors(model, adapter)
        check_base(adapter, config, base_config, name, revision=revision)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(dtype).to(fine)  # as loading rounds it, and then to compute in
    return model.eval(), stored


def load_adapted(
    adapter: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> PeftModel:
    """Load a base model in its own dtype and put a saved PAT adapter on it.

    A base that was quantised for tuning (`base_quantization` in the adapter's configuration) is quantised again in the
    same way, because it is the dequantised weights that the adapter was trained on: merged into the original ones it
    would be another function than the one that was tuned and evaluated. It can still be had, by loading base and
    adapter by hand.

    Raises:
        PatError: adapter or base cannot be read, or do not fit each other.
    """
    config = read_adapter_config(adapter)
    name, revision = base_of(adapter, config, base_model)
    base_config, _ = base_config_for(adapter, config, name, revision=revision)
    quantization = None
    if (
        isinstance(config, PatConfig)
        and config.base_quantization is not None
        and getattr(base_config, "quantization_config", None) is None
    ):
        try:
            quantization = AutoQuantizationConfig.from_dict(dict(config.base_quantization))
        except Exception as error:  # whatever the libraries of a quantisation ask of it
            raise PatError(
                f"{adapter}: its base_quantization cannot be used ({one_line(error)}); expected the one that `pat "
                "tune` has written."
            ) from error
    folder = str(Path(adapter))
    with quiet_transformers(not progress), fitting(name, adapter, config, base_config, revision):
        # On the CPU no map: peft would take one as an invitation to spread the model over what devices there are.
        device_map = None if torch.device(device).type == "cpu" else {"": torch.device(device)}
        base = load_base(name, revision=revision, quantization_config=quantization, device_map=device_map)
        if (kept := _kept_tokens(adapter, config, name, base.config, revision=revision)) is not None:
            trim_embedding(base, kept)
        grow_embedding(base, base_config.vocab_size)
        check_written_along(base, adapter, config)
        model = PeftModel.from_pretrained(base, folder)
        check_tensors(model, adapter)
        check_base(adapter, config, base_config, name, revision=revision)
    return model
