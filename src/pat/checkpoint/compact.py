"""The folder `compact/` of a run: the small base model, its ordinary LoRA adapter, and what was cut to get there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from pat.checkpoint.card import Compaction, shown_name
from pat.checkpoint.staging import staged_folder
from pat.checkpoint.verify import Parity, check, compare, permutation_floor
from pat.checkpoint.write import count_parameters, quiet_transformers, savable_generation_config
from pat.errors import PatError
from pat.tuner.compaction import CompactModel
from pat.tuner.model import PatModel

MODEL, ADAPTER, RECORD = "model", "adapter", "compaction.json"
"""What the folder holds."""


COMPACTION_REFUSED = (
    "The compact model is not the masked one: {missed}. The adapter as of the milestone and the checkpoints are kept; "
    "go on at full width with --resume_from_checkpoint true --no_compact true."
)


def describe_compaction(tuner: PatModel, parity: Parity) -> Compaction:
    """Return the record of a compaction of the active adapter."""
    mask, config = tuner.mask(), tuner.pat_config()
    return Compaction(
        base_model=shown_name(config.base_model_name_or_path or "unknown"),
        hidden_size=mask.hidden_size,
        pruned_hidden_size=mask.pruned_hidden_size,
        num_parameters_base=count_parameters(cast(PreTrainedModel, tuner.model).config),
        rotation=config.resolved_rotation or "none",
        mask=config.mask,
        milestone_step=mask.milestone_step,
        parity=parity.to_dict(),
    )


def write_compact(
    masked: PeftModel, tuner: PatModel, folder: Path, *, tokenizer: Any, batches: Iterable[Mapping[str, Any]], seed: int
) -> tuple[CompactModel, Compaction]:
    """Compact the active adapter, compare both models, and write the small one; the folder appears complete or not.

    Args:
        masked: the peft model with the PAT adapter.
        tuner: the tuner in it.
        folder: a new or empty folder.
        tokenizer: saved beside the small base.
        batches: text to compare on, see `compare`.
        seed: of LoRA that starts anew.

    Raises:
        RunFailed: the compact model is not the masked one; nothing is written.
    """
    batches = list(batches)
    with staged_folder(folder) as staging, quiet_transformers(True):
        parts = tuner.compact()
        if parts.base.generation_config is not None:
            parts.base.generation_config = savable_generation_config(parts.base.generation_config)
        parts.base.save_pretrained(staging / MODEL)
        tokenizer.save_pretrained(staging / MODEL)
        compact = parts.attach(seed)
        parity = compare(masked, compact.model, batches)
        parity = check(parity, COMPACTION_REFUSED, floor=lambda: permutation_floor(tuner.merge_and_unload(), batches))
        record = describe_compaction(tuner, parity)
        parts.config.base_model_name_or_path = str(staging / MODEL)  # peft looks for the configuration there
        compact.model.save_pretrained(str(staging / ADAPTER))
        parts.config.base_model_name_or_path = os.path.realpath(folder / MODEL)
        parts.config.save_pretrained(str(staging / ADAPTER))
        (staging / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    return compact, record


def read_compaction(folder: Path) -> Compaction:
    """Read the record of a compaction.

    Raises:
        PatError: there is none, or it is not readable.
    """
    path = folder / RECORD
    try:
        return Compaction(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PatError(
            f"{path}: not the record of a compaction ({' '.join(str(error).split())}); resume without that checkpoint."
        ) from error
