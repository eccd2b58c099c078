"""Merge an adapter into its base model without holding either model: tensors are read, folded and written one by one.

In memory at once: the adapter, one module's weights, and the last tensor on its way to the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from pat.checkpoint.adapter import check_complete, fitting
from pat.checkpoint.card import Compaction, Cut
from pat.checkpoint.hollow import StoredWeights, hollow_model
from pat.checkpoint.layout import UnknownLayoutError
from pat.checkpoint.memory import return_freed_memory
from pat.checkpoint.read import open_checkpoint
from pat.checkpoint.shards import ShardWriter
from pat.checkpoint.verify import Parity, check, compare, permutation_floor
from pat.checkpoint.write import (
    MAX_SHARD_SIZE,
    load_written,
    quiet_transformers,
    savable_generation_config,
    write_card,
)
from pat.errors import PatError, RunFailed
from pat.loading import load_config, stored_dtype
from pat.surgery.adapted import AdaptedMatrix, merged
from pat.surgery.dense import DenseForm
from pat.tuner import PatConfig
from pat.tuner.merging import adapted_form
from pat.tuner.model import find_tuner
from pat.tuner.prepare import check_config
from pat.tuner.weights import PREFIX, factored_parameter

_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Of LoRA, those that leave the base model's weights as they are."""


@dataclass(frozen=True)
class HollowModel:
    """An adapted model whose base stays on disk."""

    model: PeftModel
    weights: StoredWeights

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, with the adapter's layers in it."""
        return self.weights.model

    def parameter(self, name: str) -> Tensor:
        """Return a base parameter as the adapted model uses it; one without adapter comes as it is stored."""
        return merged(self.factored(name))

    def factored(self, name: str) -> Tensor | AdaptedMatrix:
        """Return the same with a plain LoRA not multiplied out."""
        module = self.base.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return self.weights.read(name)
        with self.weights.present(name):
            return factored_parameter(self.base, name, self.model.active_adapter)


def load_hollow(
    adapter: str | os.PathLike[str], name: str, config: LoraConfig, *, device: str | torch.device = "cpu"
) -> HollowModel | None:
    """Put a saved adapter on a base model that stays on disk, None if that base or adapter has to be in memory.

    That is so for bases that are quantised or not stored as safetensors, for initialisations of LoRA that change the
    base, and for adapters that carry weights of the base (LoRA on the embedding).

    Raises:
        PatError: adapter or base cannot be read, or do not fit each other.
    """
    base_config, family = load_config(name)
    quantised = getattr(base_config, "quantization_config", None) is not None
    if isinstance(config, PatConfig):
        check_config(base_config, family, config)
        quantised = quantised or config.base_quantization is not None
    if quantised or config.init_lora_weights not in _INITIALISATIONS:
        return None
    with fitting(name, adapter):
        if _carries_base_weights(adapter):
            return None
    checkpoint = open_checkpoint(name)
    if checkpoint is None:
        return None
    first = next((stored.dtype for stored in checkpoint.tensors.values() if stored.dtype is not None), None)
    dtype = stored_dtype(base_config) or first or torch.float32
    base = hollow_model(base_config, dtype, torch.device(device))
    with suppress(OSError):  # then it is what the model's configuration says
        base.generation_config = GenerationConfig.from_pretrained(name)
    try:
        weights = StoredWeights(base, checkpoint)
    except UnknownLayoutError:
        return None
    # peft rounds an adapter to the dtype of the layer it is loaded beside.
    fine = torch.promote_types(dtype, torch.float32)
    with quiet_transformers(True), fitting(name, adapter), weights.as_dtype(fine):
        folder = str(Path(adapter).expanduser())
        model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True, torch_device=str(device))
        check_complete(model, adapter)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.to(dtype).to(fine)  # as loading rounds it, and then to compute in
    return_freed_memory()
    return HollowModel(model.eval(), weights)


def stream_checkpoint(
    hollow: HollowModel,
    folder: Path,
    *,
    tokenizer: Any,
    batches: Iterable[Mapping[str, Any]],
    dtype: torch.dtype | None,
    precision: torch.dtype | None = None,
    provenance: Mapping[str, Any],
    compaction: Compaction | None = None,
    progress: bool = False,
    max_shard_size: int | str | None = None,
    timings: dict[str, float] | None = None,
) -> tuple[Parity, Cut]:
    """Fold, write, read back and compare, tensor by tensor, in an existing folder; `save_checkpoint` in little memory.

    Args:
        hollow: what to merge.
        folder: an existing folder.
        tokenizer: saved along with its chat template; None to leave it out.
        batches: text to compare on, see `compare`.
        dtype: of the dense model; by default the base's.
        precision: to fold matrices in; by default see `fold_precision`.
        provenance: for the model card, see `render_card`.
        compaction: what was cut before, if this is a compact model with its ordinary LoRA adapter.
        progress: show a bar over the tensors.
        max_shard_size: size limit of one weight file; by default that of the base's.
        timings: takes down the seconds that folding with writing, and comparing, have taken.

    Raises:
        PatError: the adapter is before its milestone, or a folded weight is not finite.
        RunFailed: the checkpoint could not be written, or is not the tuned model.
    """
    timings = {} if timings is None else timings
    started = time.perf_counter()
    dtype = dtype or hollow.weights.dtype
    form = _dense_form(hollow, dtype, precision or fold_precision(dtype))
    dense = hollow_model(form.config, dtype, hollow.weights.device)
    limit = max_shard_size or hollow.weights.checkpoint.shard_bytes() or MAX_SHARD_SIZE
    bar = tqdm(total=form.num_weights, desc="Folding", unit="tensor", disable=not progress)
    with bar, ShardWriter(folder, dense, dtype, max_shard_size=limit) as writer:
        for name, tensor in form.weights:
            rounded = tensor.to(dtype).contiguous()
            if not _is_finite(rounded):
                raise PatError(f"Got non-finite values in the folded weight {name}; the adapter is broken.")
            writer.write(name, rounded)
            del tensor, rounded  # or they would be there while the next one is folded
            bar.update()
    timings["fold_seconds"] = time.perf_counter() - started
    return_freed_memory()
    try:
        _write_configuration(hollow, dense, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise RunFailed(f"Writing the checkpoint failed ({' '.join(str(error).split())}).") from error
    started = time.perf_counter()
    batches = list(batches)
    parity = _compare(hollow, dense, folder, batches)
    timings["verify_seconds"] = time.perf_counter() - started
    # Only a model that is stored in 32 bits comes to the floor, and only if it is past the tolerance.
    parity = check(parity, floor=lambda: _floor(folder, dtype, hollow.weights.device, batches))
    return parity, write_card(folder, dense, find_tuner(hollow.model), compaction, parity, provenance)


def fold_precision(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to fold matrices in that are written in `dtype`.

    Weights of 16 bits are rounded when they are written, by up to 2^-9 (bfloat16) or 2^-12 of their size. What folding
    in float32 adds is some 2^-20, and it takes a third of the time (docs/results.md).
    """
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


def _carries_base_weights(adapter: str | os.PathLike[str]) -> bool:
    with safe_open(Path(adapter).expanduser() / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        return any(".base_layer." in name and PREFIX not in name for name in file.keys())  # noqa: SIM118


def _dense_form(hollow: HollowModel, dtype: torch.dtype, precision: torch.dtype) -> DenseForm:
    tuner = find_tuner(hollow.model)
    if tuner is None:
        return adapted_form(hollow.base, hollow.weights.shapes, hollow.parameter)
    masked = replace(tuner.masked_model(tuner.adapter, "a merge"), factored=hollow.factored)
    return masked.dense_form(dtype, precision=precision, empty=hollow.weights.memory.empty)


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether there is neither infinity nor NaN in a tensor: one pass, of which `isfinite` takes three."""
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())  # both hand on a NaN


def _write_configuration(hollow: HollowModel, dense: PreTrainedModel, folder: Path) -> None:
    """Write what `save_pretrained` writes beside the weights."""
    config = dense.config
    config.dtype = str(dense.dtype).removeprefix("torch.")
    config.architectures = [type(dense).__name__]
    config.save_pretrained(folder)
    if hollow.base.generation_config is not None:
        savable_generation_config(hollow.base.generation_config).save_pretrained(folder)


def _compare(hollow: HollowModel, dense: PreTrainedModel, folder: Path, batches: Iterable[Mapping[str, Any]]) -> Parity:
    """Compare what was written with the tuned model, both computing in float32 or better."""
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint is not None
    with closing(checkpoint):
        try:
            written = StoredWeights(dense, checkpoint, hollow.weights.memory)
        except (PatError, UnknownLayoutError) as error:
            raise RunFailed(f"The written checkpoint does not load cleanly: {error}") from error
        if written.left_over:
            raise RunFailed(f"The written checkpoint does not load cleanly: {min(written.left_over)} is left over.")
        with hollow.weights.running(_fine(hollow.weights.dtype)), written.running(_fine(written.dtype)):
            return compare(hollow.model, dense, batches)


def _floor(folder: Path, dtype: torch.dtype, device: torch.device, batches: Iterable[Mapping[str, Any]]) -> Parity:
    """Load the written model whole, and permute it."""
    written: nn.Module = load_written(folder, dtype)
    return permutation_floor(cast(PreTrainedModel, written.to(device)), batches)


def _fine(dtype: torch.dtype) -> torch.dtype:
    """To compute in: many processors take twenty times as long for a product in bfloat16."""
    return torch.promote_types(dtype, torch.float32)
