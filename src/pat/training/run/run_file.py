"""`run.json` says which configuration a run has, what it runs on, and how far it has come."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import MISSING, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig
from trl import ModelConfig, SFTConfig

from pat import ranks
from pat.checkpoint.card import shown_name
from pat.checkpoint.places import RUN_FILE
from pat.data.load import chat_template_of
from pat.data.mixture import shares
from pat.data.tokens import TRAINED_ON
from pat.errors import PatError, one_line
from pat.kinds import misfits
from pat.loading.fingerprint import base_fingerprint
from pat.loading.hub import hub_options
from pat.report.records import plain, to_json
from pat.training.arguments import TuneArguments
from pat.training.options import DistillOptions, RunOptions
from pat.training.refused import REFUSED
from pat.tuner.options import PatOptions
from pat.whole_files import write_whole

if TYPE_CHECKING:
    from pat.training.inputs.prepare import Prepared


_MAY_CHANGE = """
max_steps num_train_epochs *batch_size* gradient_accumulation_steps torch_empty_cache_steps
output_dir overwrite keep_checkpoints save_* log_* logging_* eval_* prediction_loss_only load_best_model_at_end
metric_for_best_model greater_is_better include_num_input_tokens_seen report_to run_name project trackio_*
push_to_hub hub_* on_bad_row disable_tqdm debug skip_memory_metrics
resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint no_compact
dataloader_* dataset_num_proc use_cpu dtype bf16* fp16* tf32 attn_implementation gradient_checkpointing*
fsdp* deepspeed ddp_* average_tokens_across_devices eval_use_gather_object
activation_* torch_compile* use_liger_kernel liger_kernel_config use_cache full_determinism accelerator_config
"""

MAY_CHANGE = tuple(_MAY_CHANGE.split())
"""Options, or patterns of them, that a run may be gone on with otherwise than it began: how long, how much at once,
what is written, shown and measured on the way, how it goes on, and where and how it is computed."""

_FILES = ("held_out", "general_text", "calibration", "chat_template_path")
"""Options that may name a file."""

DATE = "strftime_now"
"""Function by which a chat template writes the date."""

NUM_FINGERPRINTED = 256
"""Examples to train on by whose tokens a run is known again."""

_NOT_THE_MODELS = ("_name_or_path", "transformers_version")
"""Keys of a configuration that say how it was loaded."""


@dataclass(frozen=True)
class RunFile:
    """Description of a run, by which it is told whether it may be gone on with."""

    configuration: dict[str, Any]
    """Every option but those that may change."""
    base: str
    """Fingerprint of the base model."""
    data: str
    """Fingerprint of the data that is trained on."""
    finished: list[str] = field(default_factory=list)
    """Phases that are done: `stage_one`, `compaction`, `stage_two`, `model`, `results`, `pushed`."""
    tokens: str | None = None
    """Fingerprint of what tokenizer and template make of the data; None in a run of an older version."""
    bf16: bool | None = None
    """Whether it began in bf16; unless a flag says otherwise it goes on so, whatever a new measurement would choose."""
    rows_per_step: int | None = None
    """Number of rows that a step takes, over all processes."""
    num_threads: int | None = None
    """Number of threads of its last sitting, if that was one process on a CPU. It goes on with as many, so that its
    numbers stay the same."""

    @classmethod
    def of(cls, arguments: TuneArguments, base_config: Any, data: str, tokens: str | None = None) -> RunFile:
        """Describe a run by its arguments, its base model, and the fingerprints of its data and of their tokens."""
        configuration = {
            option.name: plain(getattr(part, option.name))
            for part in (arguments.model, arguments.sft, arguments.pat, arguments.distill, arguments.run)
            for option in fields(part)
            if option.name not in REFUSED and not any(fnmatchcase(option.name, name) for name in MAY_CHANGE)
        }
        names = [shown_name(name) for name in arguments.run.dataset_names]
        shown: dict[str, Any] = {
            "model_name_or_path": shown_name(str(configuration["model_name_or_path"])),
            "dataset_name": names[0] if len(names) == 1 else names,
        }
        if (weights := arguments.run.dataset_weights) is not None:
            shown["dataset_weights"] = [round(share, 12) for share in shares(weights)]
        if (teacher := arguments.distill.teacher) is not None:  # checked, so that its configuration can be read
            config = AutoConfig.from_pretrained(teacher, trust_remote_code=False, **hub_options(teacher))
            shown["teacher"] = f"{shown_name(teacher)} {fingerprint(teacher, config)}"
        shown |= {name: _content(configuration[name]) for name in _FILES}
        base = fingerprint(arguments.run.model_name_or_path, base_config)
        sft = arguments.sft
        rows = sft.per_device_train_batch_size * sft.gradient_accumulation_steps * ranks.num_processes()
        return cls(configuration | shown, base, data, tokens=tokens, bf16=bool(sft.bf16), rows_per_step=rows)

    @classmethod
    def read(cls, folder: Path) -> RunFile | None:
        """Return the description in a run's folder; None if there is none.

        Raises:
            PatError: it is not readable.
        """
        path = folder / RUN_FILE
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(stored, dict):
                stored.pop("seconds", None)  # that a version in between kept here; they lie beside the checkpoints
            run = cls(**stored)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise PatError(f"{path}: not readable ({one_line(error)}); choose another output folder.") from error
        if (wrong := misfits(stored, cls)) is not None:
            raise PatError(f"{path}: {wrong}; choose another output folder.")
        return run

    def write(self, folder: Path) -> None:
        """Write the description into a run's folder."""
        write_whole(folder / RUN_FILE, to_json(self))

    def after(self, *phases: str) -> RunFile:
        """Return a copy with more phases finished."""
        return replace(self, finished=list(dict.fromkeys([*self.finished, *phases])))

    def with_threads(self, num_threads: int | None) -> RunFile:
        """Return a copy with the number of threads that it is computed with."""
        return replace(self, num_threads=num_threads)

    def only(self, *phases: str) -> RunFile:
        """Return a copy with no more than these phases finished."""
        return replace(self, finished=[phase for phase in self.finished if phase in phases])

    def check(self, given: RunFile, folder: Path) -> None:
        """Check that a run may be gone on with as another is described.

        Raises:
            PatError: it may not; the message holds the differences.
        """
        # A run that is older than an option had its default.
        known = _defaults() | self.configuration
        pairs = {
            name: (known.get(name), given.configuration.get(name))
            for name in {**self.configuration, **given.configuration}
        }
        pairs |= {
            f"fingerprint of the {name}": (getattr(self, name)[-8:], getattr(given, name)[-8:])
            for name in ("base", "data", "tokens")
            if getattr(self, name) is not None and getattr(given, name) is not None
        }
        differing = [
            f"{name}: {'not given' if old is None else old} in the run, {'not' if new is None else new} given"
            for name, (old, new) in pairs.items()
            if old != new
        ]
        if differing:
            raise PatError(
                f"{folder}: the run there has another configuration ({'; '.join(differing)}); go on with its own, "
                "choose another output folder, or start anew with --overwrite true."
            )


def tokens_fingerprint(data: Prepared) -> str:
    """Digest the first examples to train on, and those to measure on: what tokenizer and template make of the data.

    A template that writes the date makes others of them every day; it is digested itself, with the vocabulary.
    """
    tokenizer = data.vocabulary.tokenizer
    if DATE in (template := chat_template_of(tokenizer)):
        facts = [template, tokenizer.get_vocab(), tokenizer.special_tokens_map]
        return f"tokens:{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"
    first = data.train.select(range(min(NUM_FINGERPRINTED, len(data.train)))).to_list()
    found = hashlib.sha256()
    for example in chain(first, data.held_out, data.held_out_of_base or ()):
        found.update(json.dumps([list(example[name]) for name in TRAINED_ON]).encode())
    return f"tokens:{found.hexdigest()[:16]}"


def _defaults() -> dict[str, Any]:
    parts = (ModelConfig, SFTConfig, PatOptions, DistillOptions, RunOptions)
    given = {option.name: option for part in parts for option in fields(part)}
    return {
        name: plain(option.default if option.default_factory is MISSING else option.default_factory())
        for name, option in given.items()
        if option.default is not MISSING or option.default_factory is not MISSING
    }


def _content(value: Any) -> str | None:
    """Return what is compared of an option that may name a file: the digest of its content, wherever it lies."""
    if value is None or not os.path.isfile(value):
        return None if value is None else shown_name(value)
    return f"sha256:{hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]}"


def fingerprint(name: str, base_config: Any) -> str:
    """Digest a model: its configuration, and a little of each tensor where its files are on this machine."""
    facts = {key: value for key, value in plain(base_config.to_dict()).items() if key not in _NOT_THE_MODELS}
    found = base_fingerprint(base_config, name)
    return (found or hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())[:16]
