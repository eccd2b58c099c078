"""Loads the models of a run: its base, and the compact one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, prepare_model_for_kbit_training
from transformers import PreTrainedModel, set_seed
from trl import get_quantization_config

from pat.checkpoint.compact import check_compact, read_compaction
from pat.loading import load_base, load_config, quantization_of
from pat.report.progress import is_live, phase
from pat.training.arguments import TuneArguments
from pat.training.engines.engine import place_for
from pat.training.inputs.prepare import Prepared


def load(arguments: TuneArguments, data: Prepared) -> PreTrainedModel:
    """Load the base onto the trainer's device, quantised if asked for, with embeddings for tokens that were added."""
    options, sft = arguments.model, arguments.sft
    quantization = get_quantization_config(options)
    set_seed(sft.seed)
    name = arguments.run.model_name_or_path
    # A download draws bars of its own, which the live line would garble.
    with phase(f"Loading {name}", shown=os.path.isdir(name) or not is_live()):
        base = load_base(
            name,
            revision=options.model_revision,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            quantization_config=quantization,
        )
    if quantization_of(base.config) is None:  # neither by a flag nor in the checkpoint
        base = cast(PreTrainedModel, cast(Any, base).to(place_for(base, sft)))
    else:
        checkpointing = bool(sft.gradient_checkpointing)
        base = cast(PreTrainedModel, prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing))
    if data.vocabulary.kept is None:  # else it is measured whole before
        data.vocabulary.fit(base)
    return base


def load_again(arguments: TuneArguments, data: Prepared) -> PreTrainedModel:
    """Load the base as it is trained."""
    base = load(arguments, data)
    data.vocabulary.fit(base)
    return base


def load_compact(arguments: TuneArguments, folder: Path, adapter: str | Path) -> PeftModel:
    """Load the small model of a folder with one of its adapters, to be trained on.

    Raises:
        PatError: it is not there, or not the one that the adapter is for.
    """
    options, sft = arguments.model, arguments.sft
    remedy = "Put it back, or start anew with --overwrite true."
    check_compact(read_compaction(folder.parent), load_config(str(folder))[0], str(folder), remedy=remedy)
    base: Any = load_base(str(folder), dtype=options.dtype, attn_implementation=options.attn_implementation)
    return with_adapter(base.to(place_for(base, sft)), adapter)


def with_adapter(base: Any, adapter: str | Path) -> PeftModel:
    """Put a stored adapter on a base, to be trained on."""
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
