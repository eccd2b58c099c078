"""Write the dense checkpoint: fold, save, read back, compare, and only then give it its name."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pat.checkpoint.card import Compaction, Cut, render_card
from pat.checkpoint.verify import Parity, check, compare, permutation_floor
from pat.errors import PatError, RunFailed
from pat.tuner.config import PatConfig
from pat.tuner.merging import merge_lora
from pat.tuner.model import PatModel, find_tuner

MAX_SHARD_SIZE = "5GB"

_SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def save_checkpoint(
    peft_model: nn.Module,
    folder: Path,
    *,
    tokenizer: Any,
    batches: Iterable[Mapping[str, Any]],
    dtype: torch.dtype | None,
    provenance: Mapping[str, Any],
    compaction: Compaction | None = None,
    progress: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> tuple[Parity, Cut]:
    """Merge the active adapter and write a verified dense checkpoint; the adapted model stays as it is.

    Args:
        peft_model: a peft model whose active adapter is a PAT adapter past its milestone, or a compact model.
        folder: an existing folder, such as `staged_folder` gives, so that it appears complete or not at all.
        tokenizer: saved along with its chat template; None to leave it out.
        batches: text to compare on, see `compare`.
        dtype: of the dense model; None for the base's.
        provenance: for the model card, see `render_card`.
        compaction: what was cut before, if this is a compact model with its ordinary LoRA adapter.
        progress: show progress bars.
        max_shard_size: size limit of one weight file, such as `"5GB"`.

    Returns:
        Figures of the comparison, and what was cut.

    Raises:
        PatError: no adapter, or an adapter before its milestone.
        RunFailed: the checkpoint could not be written, or is not the tuned model.
    """
    tuner = find_tuner(peft_model)
    if tuner is None and compaction is None:
        raise PatError(
            f"Got a {type(peft_model).__name__} without a PAT adapter; expected a model tuned with PatConfig."
        )
    batches = list(batches)
    with quiet_transformers(not progress):
        if tuner is not None:
            dense = tuner.merge_and_unload(progressbar=progress, safe_merge=True, dtype=dtype)
        else:
            compact = cast(PeftModel, peft_model)
            dense = merge_lora(compact, dtype or cast(Any, compact).dtype, check_finite=True)
        dtype = dense.dtype
        if dense.generation_config is not None:
            dense.generation_config = savable_generation_config(dense.generation_config)
        try:
            dense.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"Writing the checkpoint failed ({' '.join(str(error).split())}).") from error
        # What is compared is what lies on the disk, and there is no need to hold it twice.
        del dense
        written = load_written(folder, dtype)
    device = next(peft_model.parameters()).device
    parity = compare(peft_model, cast(nn.Module, written).to(device), batches)
    parity = check(parity, floor=lambda: permutation_floor(written, batches))
    return parity, write_card(folder, written, tuner, compaction, parity, provenance)


def write_card(
    folder: Path,
    dense: PreTrainedModel,
    tuner: PatModel | None,
    compaction: Compaction | None,
    parity: Parity,
    provenance: Mapping[str, Any],
) -> Cut:
    """Write the model card of a checkpoint whose weights are in `folder`, and return what was cut.

    That is known from the adapter's `tuner`, or from the record of the `compaction` that a compact model comes from.
    """
    if tuner is not None:
        cut = describe_cut(tuner, dense, folder)
    else:
        assert compaction is not None
        cut = compaction.cut(dense.num_parameters(), weight_bytes(folder))
    (folder / "README.md").write_text(render_card(cut, parity, provenance), encoding="utf-8")
    return cut


def load_written(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint as any user of transformers does.

    Raises:
        RunFailed: a weight is missing, left over, or of the wrong shape.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise RunFailed(f"The written checkpoint does not load cleanly: {problems}.")
    return cast(PreTrainedModel, model)


def savable_generation_config(config: GenerationConfig) -> GenerationConfig:
    """Return a copy that transformers agrees to save.

    It refuses sampling parameters beside greedy decoding, which older checkpoints have (Llama 2) and generation
    ignores: they are unset.
    """
    config = copy.deepcopy(config)
    if not config.do_sample:
        for flag in _SAMPLING_FLAGS:
            if hasattr(config, flag):
                setattr(config, flag, None)
    return config


def count_parameters(config: PretrainedConfig) -> int:
    """Count the parameters of the model a configuration describes; shared ones (tied embeddings) count once."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # 4-bit storage holds two weights in one element
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain)
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def describe_cut(tuner: PatModel, dense: PreTrainedModel, folder: Path) -> Cut:
    """Return what merging the active adapter cut, for the dense model written to a folder."""
    mask = tuner.mask()
    config = cast(PatConfig, tuner.peft_config[tuner.adapter])
    return Cut(
        hidden_size=mask.hidden_size,
        pruned_hidden_size=mask.pruned_hidden_size,
        num_parameters_base=count_parameters(cast(PreTrainedModel, tuner.model).config),
        num_parameters=dense.num_parameters(),
        num_bytes=weight_bytes(folder),
        rotation=config.resolved_rotation or "none",
        mask=config.mask,
        milestone_step=mask.milestone_step,
    )


@contextmanager
def quiet_transformers(quiet: bool) -> Iterator[None]:
    """Keep transformers from showing its progress bars, if so wanted, and leave its setting as it was."""
    shown: Any = transformers_logging
    before = shown.is_progress_bar_enabled()
    if quiet:
        shown.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            shown.enable_progress_bar()
