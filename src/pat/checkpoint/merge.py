"""`pat merge`: a saved adapter and its base model become one dense checkpoint, verified on text.

Neither model is in memory where the base can stay on disk: tensors are read, folded and written one at a time.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from transformers import PretrainedConfig

from pat.checkpoint.adapter import (
    base_config_for,
    base_of,
    load_adapted,
    load_hollow,
    read_adapter_config,
)
from pat.checkpoint.adapter_tokens import adapter_tokens
from pat.checkpoint.card import Cut, shown_name
from pat.checkpoint.compact import compaction_of
from pat.checkpoint.options import MergeOptions
from pat.checkpoint.places import ADAPTER, COMPACT, RECORD, RESULTS
from pat.checkpoint.staging import check_output_folder, staged_folder
from pat.checkpoint.verification_text import MAX_TOKENS, verification_batches
from pat.checkpoint.verify import Parity
from pat.checkpoint.write import MAX_SHARD_SIZE, save_checkpoint
from pat.errors import PatError
from pat.loading import TokenSetup, check_quantization
from pat.loading.weights import resolve_device
from pat.report.records import Record, collected_warnings, write_record
from pat.surgery.describe import count_parameters
from pat.tuner import PatConfig

logger = logging.getLogger(__name__)


LARGE_MODEL = 10**9
LARGE_MODEL_TOKENS = 64
"""A model of as many parameters or more is compared on so few tokens, because every window reads both models anew."""


@dataclass(frozen=True, kw_only=True)
class MergeRecord(Record):
    """The result of a merge. Only the last component of a path is kept."""

    command: Literal["merge"] = "merge"
    model_name_or_path: str
    """The base model."""
    pat_config: dict[str, Any] | None
    """Configuration of the PAT adapter; None for the ordinary LoRA adapter of a compact model."""
    lora_config: dict[str, Any] | None
    """Configuration of the ordinary LoRA adapter of a compact model."""
    cut: Cut
    parity: Parity
    timings: dict[str, float]


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: where the model is, and its record."""

    model_dir: Path
    record: MergeRecord

    @property
    def parity(self) -> Parity:
        """Comparison of tuned and dense model."""
        return self.record.parity


def print_merge(result: MergeResult) -> None:
    """Print where the checkpoint is, and how exact."""
    print(f"Wrote {result.model_dir} ({result.record.cut.num_parameters:,} parameters); {result.parity.describe()}")


def merge(
    adapter: str | os.PathLike[str], output_dir: str | os.PathLike[str], *, progress: bool = True, **options: Any
) -> MergeResult:
    """Merge a saved adapter into a dense checkpoint; see `run_merge`, and `MergeOptions` for the keywords."""
    return run_merge(MergeOptions(adapter=Path(adapter), output_dir=Path(output_dir), **options), progress=progress)


def run_merge(options: MergeOptions, *, progress: bool = True) -> MergeResult:
    """Merge a saved adapter into a dense checkpoint in `output_dir`, with a model card and `results.json`.

    Raises:
        PatError: the adapter, the base model or the output folder cannot be used; nothing has been written.
        RunFailed: the checkpoint could not be written, or is not the tuned model; nothing is left behind.
    """
    with collected_warnings() as warnings:
        return _merge(options, warnings, progress=progress)


def _merge(options: MergeOptions, warnings: list[str], *, progress: bool) -> MergeResult:
    adapter = Path(options.adapter)
    check_writing(options)
    device = resolve_device(options.device)
    config = read_adapter_config(adapter)
    _point_to_the_last_adapter(adapter)
    name, revision = base_of(adapter, config, options.base_model)
    base_config, _ = base_config_for(adapter, config, name, revision=revision)
    check_quantization(base_config)
    form = form_of(options, adapter_tokens(adapter, name, base_config, revision=revision), base_config)
    compaction = None if isinstance(config, PatConfig) else compaction_of(adapter)
    hollow = load_hollow(adapter, name, config, revision=revision, device=device)
    model: PeftModel
    if hollow is not None:
        model, stored = hollow
    else:
        model, stored = load_adapted(adapter, base_model=name, device=device, progress=progress), None
    timings: dict[str, float] = {}
    with staged_folder(options.output_dir) as staging:
        parity, cut = save_checkpoint(
            model,
            staging,
            stored=stored,
            provenance=_provenance(adapter)
            | {"model_name_or_path": name if compaction is None else compaction.base_model, "revision": revision},
            compaction=compaction,
            progress=progress,
            timings=timings,
            **form,
        )
        paths = {"base_model_name_or_path": name, "calibration": getattr(config, "calibration", None)}
        shown = {key: path and shown_name(path) for key, path in paths.items()}
        adapter_config = cast(Any, config).to_dict() | shown
        record = MergeRecord(
            model_name_or_path=shown_name(name),
            pat_config=adapter_config if compaction is None else None,
            lora_config=None if compaction is None else adapter_config,
            cut=cut,
            parity=parity,
            timings=timings,
            warnings=warnings,
        )
        write_record(staging / RESULTS, record)
    return MergeResult(Path(options.output_dir), record)


def check_writing(options: MergeOptions) -> None:
    """Check where a checkpoint is to be written, and in files of which size.

    Raises:
        PatError: the folder is there and not empty, or the size is none.
    """
    check_output_folder(options.output_dir)
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=options.max_shard_size or MAX_SHARD_SIZE)
    except ValueError as error:
        raise PatError(
            f"Got max_shard_size={options.max_shard_size!r}; expected a size such as '5GB' or '500MB'."
        ) from error


def form_of(options: MergeOptions, tokens: TokenSetup, base_config: PretrainedConfig) -> dict[str, Any]:
    """Return what options say of a checkpoint, and the text that it is compared on, as `save_checkpoint` takes them.

    Raises:
        PatError: the text cannot be read, or is too short.
    """
    large = count_parameters(base_config) >= LARGE_MODEL
    batches = verification_batches(
        tokens.tokenizer,
        options.text_file,
        num_embeddings=base_config.get_text_config().vocab_size,
        max_positions=getattr(base_config, "max_position_embeddings", None),
        max_tokens=LARGE_MODEL_TOKENS if large else MAX_TOKENS,
    )
    return {
        "tokens": tokens,
        "batches": batches,
        "dtype": _torch_dtype(options.dtype),
        "precision": _torch_dtype(options.fold_dtype),
        "max_shard_size": options.max_shard_size,
    }


def _point_to_the_last_adapter(adapter: Path) -> None:
    """Say so if this is the adapter as of the milestone, and the run went on."""
    compact = adapter.resolve().parent / COMPACT
    if adapter.resolve().name == ADAPTER and (compact / RECORD).is_file():
        logger.warning("%s is the adapter as of the milestone; the run went on in %s.", adapter, compact / ADAPTER)


def _provenance(adapter: Path) -> dict[str, Any]:
    """Return what the run that an adapter lies in says of itself, as far as a model card tells it."""
    for folder in adapter.resolve().parents[:3]:
        try:
            results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(results, dict) and results.get("command") == "tune":
            last = folder / (ADAPTER if results.get("compaction") is None else f"{COMPACT}/{ADAPTER}")
            return _facts(results, is_last=adapter.resolve() == last.resolve())
    return {}


def _facts(results: Mapping[str, Any], *, is_last: bool) -> dict[str, Any]:
    """Return the facts of a run for a card; what the whole run came to is true of its last adapter alone."""
    names = ["dataset", "prompt_format", "recipe", "seed", "learning_rates"]
    names += ["num_steps", "num_tokens_seen"] if is_last else []
    found = {name: results[name] for name in names if name in results}
    of_models = ("base", "tuned") if is_last else ("base",)
    all_figures = {stage: figure for stage, figure in (results.get("figures") or {}).items() if stage in of_models}
    figures = {stage: figure for stage, figure in all_figures.items() if figure.get("held_out_nll") is not None}
    general = {stage: figure.get("general_nll") for stage, figure in all_figures.items()}
    kinds = ("held_out_standard_error", "held_out_difference_error")
    errors = {kind: {stage: figure.get(kind) for stage, figure in figures.items()} for kind in kinds}
    found |= {kind: {name: error for name, error in of.items() if error is not None} for kind, of in errors.items()}
    return found | {
        "is_compacted": results.get("compaction") is not None,
        "max_length": (results.get("training_arguments") or {}).get("max_length"),
        "held_out_nll": {stage: figure["held_out_nll"] for stage, figure in figures.items()},
        "base_bytes": (all_figures.get("base") or {}).get("num_bytes"),
        "flops_per_token": {"base": (all_figures.get("base") or {}).get("flops_per_token")},
        "num_held_out_tokens": next((figure.get("num_held_out_tokens") for figure in figures.values()), None),
        "general_nll": {stage: nll for stage, nll in general.items() if nll is not None},
    }


def _torch_dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else cast(torch.dtype, getattr(torch, str(name).removeprefix("torch.")))
