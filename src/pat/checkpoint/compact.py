"""The folder `compact/` of a run: the small base model, its ordinary LoRA adapter, and what was cut to get there."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers import PretrainedConfig

from pat.checkpoint.card import Compaction, shown_name
from pat.checkpoint.places import ADAPTER, MODEL, RECORD
from pat.checkpoint.staging import make_readable, staged_folder
from pat.checkpoint.verify import check, compare, permutation_floor
from pat.checkpoint.write import pruning_of, write_config
from pat.errors import PatError, one_line
from pat.kinds import misfits
from pat.loading import TokenSetup, base_fingerprint, load_config
from pat.loading.fingerprint import is_same
from pat.report.progress import quiet_transformers
from pat.tuner.compaction import CompactModel
from pat.tuner.model import PatModel

COMPACTION_REFUSED = (
    "The compact model is not the masked one: {missed}. The adapter as of the milestone and the checkpoints are kept; "
    "the same command with --no_compact true goes on at full width."
)


def write_compact(
    masked: PeftModel,
    tuner: PatModel,
    folder: Path,
    *,
    tokens: TokenSetup,
    batches: Iterable[Mapping[str, Any]],
    seed: int,
) -> tuple[CompactModel, Compaction]:
    """Compact the active adapter, compare both models, and write the small one; the folder appears complete or not.

    The seed is that of LoRA, which starts anew.

    Raises:
        RunFailed: the compact model is not the masked one; nothing is written.
    """
    batches = list(batches)
    with staged_folder(folder) as staging, quiet_transformers():
        parts = tuner.compact()
        tokens.describe(parts.base.config)
        parts.base.generation_config = copy.deepcopy(tokens.generation_config)  # trainers change it
        parts.base.save_pretrained(staging / MODEL)
        write_config(parts.base.config, staging / MODEL)
        compact = parts.attach(seed)
        parity = compare(masked, compact.model, batches)
        parity = check(parity, COMPACTION_REFUSED, floor=lambda: permutation_floor(tuner.merge_and_unload(), batches))
        name = shown_name(tuner.pat_config().base_model_name_or_path or "unknown")
        config, _ = load_config(str(staging / MODEL))
        record = Compaction(
            **asdict(pruning_of(tuner)),
            base_model=name,
            parity=asdict(parity),
            fingerprint=base_fingerprint(config, str(staging / MODEL)),
        )
        parts.config.base_model_name_or_path = str(staging / MODEL)  # peft looks for the configuration there
        save_adapter(compact.model, staging / ADAPTER, tokens)
        parts.config.base_model_name_or_path = os.path.realpath(folder / MODEL)
        parts.config.save_pretrained(str(staging / ADAPTER))
        tokens.save(staging / MODEL)
        (staging / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    return compact, record


def save_adapter(model: PeftModel, folder: Path, tokens: TokenSetup, state: Mapping[str, Tensor] | None = None) -> None:
    """Write an adapter with what else belongs to its run: tokenizer, chat template, generation config.

    The state is that of a sharded model, put together; by default it is taken from the model.
    """
    # The embedding is the base's: where the vocabulary was trimmed, its tokenizer says which rows are left.
    trimmed = getattr(model.active_peft_config, "base_vocab_size", None) is not None
    model.save_pretrained(str(folder), save_embedding_layers=False if trimmed else "auto", state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # peft's form, with nothing filled in
    tokens.save(folder)
    make_readable(folder)


def check_compact(compaction: Compaction, base_config: PretrainedConfig, name: str, *, remedy: str) -> None:
    """Refuse a small model other than the one that adapters of a compaction are for.

    Args:
        compaction: its record.
        base_config: configuration of the model.
        name: folder of the model.
        remedy: a sentence on what to do.

    Raises:
        PatError: its fingerprint is another one.
    """
    made_for, found = compaction.fingerprint, base_fingerprint(base_config, name)
    if is_same(made_for, found) is False:
        raise PatError(
            f"{shown_name(name)}: is not the compact model that the adapter was made for, or was changed since: the "
            f"fingerprint of that is …{str(made_for)[-8:]}, of this …{str(found)[-8:]}. {remedy}"
        )


def read_compaction(folder: Path) -> Compaction:
    """Read the record of a compaction.

    Raises:
        PatError: there is none, or it is not readable.
    """
    path = folder / RECORD
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        record = Compaction(**stored)
        if (wrong := misfits(stored, Compaction)) is not None:
            raise ValueError(wrong)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise PatError(
            f"{path}: not the record of a compaction ({one_line(error)}); start anew with --overwrite true."
        ) from error
    return record


def compaction_of(adapter: str | os.PathLike[str]) -> Compaction | None:
    """Return what was cut to get to the model that an adapter is for, if it is the adapter of a compact model.

    Raises:
        PatError: the record is not readable.
    """
    folder = Path(adapter).resolve()
    stored = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    # Beside the adapter, or (a checkpoint of stage two) beside the base that it names.
    places = [folder.parent, Path(stored.get("base_model_name_or_path") or "").parent]
    return next((read_compaction(place) for place in places if (place / RECORD).is_file()), None)
