"""`pat merge`: a saved adapter and its base model become one dense checkpoint, verified on text."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig

from pat.checkpoint.adapter import base_name, compaction_of, load_adapted, read_adapter_config
from pat.checkpoint.card import Cut, shown_name
from pat.checkpoint.compact import ADAPTER, RECORD
from pat.checkpoint.options import MergeOptions
from pat.checkpoint.staging import check_output_folder, staged_folder
from pat.checkpoint.streamed import load_hollow, stream_checkpoint
from pat.checkpoint.verification_text import MAX_TOKENS, verification_batches
from pat.checkpoint.verify import Parity
from pat.checkpoint.write import MAX_SHARD_SIZE, count_parameters, save_checkpoint
from pat.errors import PatError
from pat.loading import load_config, load_tokenizer
from pat.report.records import environment, write_record
from pat.tuner import PatConfig

logger = logging.getLogger(__name__)

LARGE_MODEL = 10**9
LARGE_MODEL_TOKENS = 64
"""From how many parameters on how few tokens are compared: every window costs one more reading of both models."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge came to."""

    model_dir: Path
    parity: Parity
    cut: Cut

    @property
    def num_parameters(self) -> int:
        """Parameters of the dense model."""
        return self.cut.num_parameters


def run_merge(options: MergeOptions) -> MergeResult:
    """Run `pat merge`; see `merge`."""
    return merge(
        options.adapter,
        options.output_dir,
        base_model=options.base_model,
        dtype=options.dtype,
        text_file=options.text_file,
        max_shard_size=options.max_shard_size,
        fold_dtype=options.fold_dtype,
        device=options.device,
    )


def print_merge(result: MergeResult) -> None:
    """Print where the checkpoint is, and how exact."""
    print(f"Wrote {result.model_dir} ({result.num_parameters:,} parameters); {result.parity.describe()}")


def merge(
    adapter: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    dtype: str | torch.dtype | None = None,
    text_file: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    fold_dtype: str | torch.dtype | None = None,
    max_shard_size: str | None = None,
    progress: bool = True,
) -> MergeResult:
    """Merge a saved PAT adapter into a dense checkpoint in `output_dir`, with a model card and `results.json`.

    Neither model is ever in memory: tensors are read, folded and written one at a time. For what is an exception see
    `load_hollow`.

    Args:
        adapter: folder of the adapter.
        output_dir: a new or empty folder; it appears complete, or not at all.
        base_model: folder or hub id, if the base is no longer where the adapter was trained on it.
        dtype: of the dense weights, by default the base's.
        text_file: text to compare masked and dense model on; by default one that comes with the package.
        device: where to compute.
        fold_dtype: to fold matrices in, float64 or float32; by default what the dense weights need, see
            `fold_precision`.
        max_shard_size: size limit of one weight file, such as `"5GB"`; by default that of the base's.
        progress: show progress bars.

    Raises:
        PatError: the adapter, the base model or the output folder cannot be used; nothing has been written.
        RunFailed: the checkpoint could not be written, or is not the tuned model; nothing is left behind.
    """
    check_output_folder(output_dir)
    target = None if dtype is None else _resolve_dtype("dtype", dtype, _DTYPES)
    precision = None if fold_dtype is None else _resolve_dtype("fold_dtype", fold_dtype, _FOLD_DTYPES)
    _check_shard_size(max_shard_size)
    _check_device(device)
    config = read_adapter_config(adapter)
    _point_to_the_last_adapter(adapter)
    name = base_name(adapter, config, base_model)
    base_config, _ = load_config(name)
    folder = Path(adapter).expanduser()
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer_config.json").is_file() else name)
    large = count_parameters(base_config) >= LARGE_MODEL
    batches = verification_batches(
        tokenizer,
        text_file,
        max_positions=getattr(base_config, "max_position_embeddings", None),
        max_tokens=LARGE_MODEL_TOKENS if large else MAX_TOKENS,
    )
    compaction = None if isinstance(config, PatConfig) else compaction_of(adapter)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "batches": batches,
        "dtype": target,
        "provenance": {"model_name_or_path": name if compaction is None else compaction.base_model},
        "compaction": compaction,
        "progress": progress,
    }
    timings: dict[str, float] = {}
    hollow = load_hollow(adapter, name, config, device=device)
    if hollow is None:
        model = load_adapted(adapter, base_model=base_model, device=device, progress=progress)
    with staged_folder(output_dir) as staging:
        if hollow is not None:
            parity, cut = stream_checkpoint(
                hollow, staging, precision=precision, max_shard_size=max_shard_size, timings=timings, **options
            )
        else:
            parity, cut = save_checkpoint(model, staging, max_shard_size=max_shard_size or MAX_SHARD_SIZE, **options)
        write_record(staging / "results.json", _results(name, config, parity, cut) | {"timings": timings})
    return MergeResult(Path(output_dir).expanduser(), parity, cut)


def _point_to_the_last_adapter(adapter: str | os.PathLike[str]) -> None:
    """Say so if this is the adapter as of the milestone, and the run went on."""
    compact = Path(adapter).expanduser().resolve().parent / "compact"
    if Path(adapter).expanduser().resolve().name == "adapter" and (compact / RECORD).is_file():
        logger.warning("%s is the adapter as of the milestone; the run went on in %s.", adapter, compact / ADAPTER)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FOLD_DTYPES = (torch.float64, torch.float32)


def _resolve_dtype(option: str, dtype: str | torch.dtype, allowed: Sequence[torch.dtype]) -> torch.dtype:
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) and resolved not in allowed:
        names = [str(choice).removeprefix("torch.") for choice in allowed]
        raise PatError(f"Got {option}={dtype!r}; expected {', '.join(names[:-1])} or {names[-1]}.")
    return cast(torch.dtype, resolved)


def _check_shard_size(size: str | None) -> None:
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size or MAX_SHARD_SIZE)
    except ValueError as error:
        raise PatError(f"Got max_shard_size={size!r}; expected a size such as '5GB' or '500MB'.") from error


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        detail = str(error).strip().split("\n")[0]
        raise PatError(
            f"Got device={str(device)!r}, which cannot be used here ({detail}); expected cpu or cuda."
        ) from error


def _results(name: str, config: LoraConfig, parity: Parity, cut: Cut) -> dict[str, Any]:
    stored: dict[str, Any] = cast(Any, config).to_dict()
    paths = {"base_model_name_or_path": name, "calibration": getattr(config, "calibration", None)}
    return {
        "command": "merge",
        **environment(),
        "model_name_or_path": shown_name(name),
        ("pat_config" if isinstance(config, PatConfig) else "lora_config"): stored
        | {key: path and shown_name(path) for key, path in paths.items()},
        "cut": asdict(cut),
        "parity": parity.to_dict(),
    }
