"""Write the dense checkpoint: fold, write, read back, compare. Tensors are folded and written one at a time."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from pat.checkpoint.card import Compaction, Cut, Pruning, render_card
from pat.checkpoint.hollow import StoredWeights, hollow_model
from pat.checkpoint.layout import UnknownLayoutError
from pat.checkpoint.shards import ShardWriter, writing_failed
from pat.checkpoint.verify import Parity, check, compare, permutation_floor
from pat.errors import PatError, RunFailed
from pat.loading import TokenSetup, empty_model
from pat.loading.stored import stored_tensors
from pat.loading.tokenizer import savable_generation_config
from pat.report.progress import phase, quiet_transformers
from pat.serving import trouble
from pat.shape import AXES
from pat.surgery.adapted import AdaptedMatrix, merged
from pat.surgery.axes import sizes_of
from pat.surgery.costs import build_skeleton, cost_of, usual_context
from pat.surgery.dense import DenseForm, rounded
from pat.surgery.describe import count_parameters
from pat.surgery.residual import ResidualStream, model_tensors
from pat.surgery.rope import legacy_rope, rope_of
from pat.tuner.merging import adapted_form
from pat.tuner.model import PatModel, find_tuner
from pat.tuner.weights import factored_parameter

MAX_SHARD_SIZE = "5GB"


def save_checkpoint(
    model: nn.Module,
    folder: Path,
    *,
    batches: Iterable[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    stored: StoredWeights | None = None,
    tokens: TokenSetup | None = None,
    dtype: torch.dtype | None = None,
    precision: torch.dtype | None = None,
    compaction: Compaction | None = None,
    progress: bool = False,
    max_shard_size: int | str | None = None,
    timings: dict[str, float] | None = None,
) -> tuple[Parity, Cut]:
    """Merge the active adapter and write a verified dense checkpoint; the adapted model stays as it is.

    Args:
        model: a peft model whose active adapter is a PAT adapter past its milestone, or a compact model.
        folder: an existing folder, such as `staged_folder` gives, so that it appears complete or not at all.
        batches: text to compare on, see `compare`.
        provenance: for the model card, see `render_card`.
        stored: where the base's weights are read from, if the base is hollow.
        tokens: the tokenizer and what belongs to it; None leaves the tokenizer out and the rest as the base has it.
        dtype: of the dense model, by default the base's.
        precision: to fold matrices in, float64 or float32; by default float64 in memory, and as `fold_precision` has it
            where the base is on disk.
        compaction: what was cut before, if this is a compact model with its ordinary LoRA adapter.
        progress: show a bar over the tensors.
        max_shard_size: size limit of one weight file, such as `"5GB"`; by default that of the base's.
        timings: takes down the seconds that folding with writing, and comparing, have taken.

    Returns:
        Figures of the comparison, and what was cut.

    Raises:
        PatError: no adapter, an adapter before its milestone, or a folded weight that is not finite.
        RunFailed: the checkpoint could not be written, or is not the tuned model.
    """
    tuner = find_tuner(model)
    if tuner is None and compaction is None:
        raise PatError(f"Got a {type(model).__name__} without a PAT adapter; expected a model tuned with PatConfig.")
    batches = list(batches)
    base = cast(PreTrainedModel, tuner.model if tuner is not None else cast(PeftModel, model).get_base_model())
    dtype = dtype or (base.dtype if stored is None else stored.dtype)
    timings = {} if timings is None else timings
    started = time.perf_counter()
    precision = precision or (torch.float64 if stored is None else fold_precision(dtype))
    form = _dense_form(model, base, tuner, stored, dtype, precision)
    dense = empty_model(form.config, dtype)
    limit = max_shard_size or (stored and stored.shard_bytes) or MAX_SHARD_SIZE
    with (
        ShardWriter(folder, dense, dtype, max_shard_size=limit) as writer,
        phase("Folding", "tensors", total=form.num_weights, shown=progress) as folding,
    ):
        for name, tensor in folding.over(form.weights):
            writer.write(name, rounded(name, tensor, dtype))
            del tensor  # or it would be there while the next one is folded
    timings["fold_seconds"] = time.perf_counter() - started
    try:
        _write_companions(base, dense, folder, tokens)
    except (OSError, SafetensorError) as error:
        raise writing_failed(error) from error
    started = time.perf_counter()
    parity, cut = examine(model, folder, dense, batches, stored=stored, compaction=compaction, progress=progress)
    timings["verify_seconds"] = time.perf_counter() - started
    cost = cost_of(build_skeleton(dense.config, torch.bfloat16), usual_context(dense.config))
    flops = {**(provenance.get("flops_per_token") or {}), "dense": cost.prefill_flops_per_token}
    facts = {**provenance, "flops_per_token": flops, "engines": trouble(dense.config.model_type, cut.axes)}
    (folder / "README.md").write_text(render_card(cut, parity, facts), encoding="utf-8")
    return parity, cut


def examine(
    model: nn.Module,
    folder: Path,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    stored: StoredWeights | None = None,
    compaction: Compaction | None = None,
    progress: bool = False,
) -> tuple[Parity, Cut]:
    """Compare a dense checkpoint with the adapted model that it was made of; see `save_checkpoint`.

    `dense` is the checkpoint's model; its weights are not looked at, and may be on the meta device.

    Raises:
        RunFailed: the checkpoint does not load, or is not the tuned model.
    """
    batches, dtype = list(batches), dense.dtype
    with quiet_transformers(not progress):
        parity = _compare(model, dense, folder, stored, dtype, batches)
        # Only a model that computes in 32 bits comes to the floor, and only if it is past the tolerance.
        device = next(model.parameters()).device
        parity = check(parity, floor=lambda: permutation_floor(load_written(folder, dtype, device), batches))
    tuner = find_tuner(model)
    pruning = cast(Pruning, compaction) if tuner is None else pruning_of(tuner)
    num_parameters = dense.num_parameters()
    return parity, Cut.of(
        pruning,
        num_parameters=num_parameters,
        num_bytes=num_parameters * dtype.itemsize,
        file_bytes=weight_bytes(folder),
    )


def fold_precision(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to fold matrices in that are written in `dtype`.

    Weights of 16 bits are rounded when they are written, by up to 2^-9 (bfloat16) or 2^-12 of their size. What folding
    in float32 adds is some 2^-20, and it takes a third of the time (docs/results.md).
    """
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


def load_written(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a checkpoint as any user of transformers does.

    Raises:
        RunFailed: a weight is missing, left over, or of the wrong shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise RunFailed(f"The written checkpoint does not load cleanly: {problems}.")
    return cast(PreTrainedModel, model.to(device))


def write_config(config: PretrainedConfig, folder: Path) -> None:
    """Write `config.json`, in the words of transformers 4 as well.

    Some configurations of transformers 5 would take the old words for something else. They go without these, since
    transformers 4 has none of their families.
    """
    config.save_pretrained(folder)
    path = folder / CONFIG_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))

    def read(more: Mapping[str, Any]) -> PretrainedConfig:
        return type(config).from_dict(copy.deepcopy(fields | dict(more)))

    rope = legacy_rope(config)
    if rope_of(read(rope)) == rope_of(config):
        fields |= rope
    renamed = {old: fields[new] for old, new in config.attribute_map.items() if new in fields and old not in fields}
    if read(renamed).to_dict() == read({}).to_dict():
        fields |= renamed
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def pruning_of(tuner: PatModel) -> Pruning:
    """Return what merging or compacting the active adapter cuts, with the sizes that it leaves alone."""
    mask, config, stream = tuner.mask(), tuner.pat_config(), cast(ResidualStream, tuner.residual_stream)
    base_config = copy.deepcopy(cast(PreTrainedModel, tuner.model).config)
    sizes: dict[str, Any] = {}
    before = sizes_of(base_config, stream.family)
    for axis in AXES.values():
        sizes |= dict.fromkeys((axis.field, axis.option), before.get(axis.field))
    for name, (gate, *_) in tuner.gates_by_axis().items():
        sizes |= {AXES[name].field: gate.size, AXES[name].option: gate.num_kept}
    sizes["pruned_vocab_size"] = base_config.vocab_size
    if config.base_vocab_size is not None:
        base_config.vocab_size = config.base_vocab_size
    sizes["vocab_size"] = base_config.vocab_size
    return Pruning(
        **sizes,
        num_parameters_base=count_parameters(base_config, tied=stream.head is None),
        rotation=config.resolved_rotation or "none",
        mask=config.mask,
        milestone_step=mask.milestone_step,
    )


def _dense_form(
    model: nn.Module,
    base: PreTrainedModel,
    tuner: PatModel | None,
    stored: StoredWeights | None,
    dtype: torch.dtype,
    precision: torch.dtype,
) -> DenseForm:
    adapter = tuner.adapter if tuner is not None else cast(PeftModel, model).active_adapter

    def factored(name: str) -> Tensor | AdaptedMatrix:
        return factored_parameter(base, name, adapter) if stored is None else stored.factored(name, adapter)

    if tuner is None:
        names = model_tensors(empty_model(base.config))
        return adapted_form(base, names, lambda name: merged(factored(name)))
    masked = replace(tuner.masked_model(adapter, "a merge"), factored=factored)
    return masked.dense_form(dtype, precision=precision)


def _write_companions(base: PreTrainedModel, dense: PreTrainedModel, folder: Path, tokens: TokenSetup | None) -> None:
    """Write what `save_pretrained` writes beside the weights, and the tokenizer."""
    config = dense.config
    config.dtype = str(dense.dtype).removeprefix("torch.")
    config.architectures = [type(dense).__name__]
    if tokens is not None:
        tokens.describe(config)
        tokens.save(folder)
    elif base.generation_config is not None:
        savable_generation_config(base.generation_config).save_pretrained(folder)
    write_config(config, folder)


def _compare(
    model: nn.Module,
    dense: PreTrainedModel,
    folder: Path,
    stored: StoredWeights | None,
    dtype: torch.dtype,
    batches: list[Mapping[str, Any]],
) -> Parity:
    """Compare what was written with the tuned model; both run from disk, in float32 or better, if the base is there."""
    if stored is None:
        return compare(model, load_written(folder, dtype, next(model.parameters()).device), batches)
    try:
        tensors = stored_tensors(str(folder)) or {}
        written = StoredWeights(hollow_model(dense.config, dtype, stored.device), tensors, folder.name)
    except (PatError, UnknownLayoutError) as error:
        raise RunFailed(f"The written checkpoint does not load cleanly: {error}") from error
    if written.left_over:
        raise RunFailed(f"The written checkpoint does not load cleanly: {min(written.left_over)} is left over.")
    # Many processors take twenty times as long for a product in bfloat16.
    with stored.running(_fine(stored.dtype)), written.running(_fine(dtype)):
        return compare(model, written.model, batches)


def _fine(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
