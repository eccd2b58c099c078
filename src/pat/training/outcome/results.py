"""The record of a run: the size and the likelihood of its models, and everything that leads to them."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from pat.checkpoint.card import Compaction, Cut
from pat.checkpoint.places import ADAPTER, COMPACT, MODEL
from pat.checkpoint.verify import Parity
from pat.data.record import DataRecord
from pat.loading import quantization_of
from pat.loading.stored import stored_tensors
from pat.report.records import Machine, Record
from pat.surgery.describe import count_parameters
from pat.training.distillation.teacher import TeacherRecord
from pat.training.outcome.samples import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """Size of a model, of its weights as they are stored in a checkpoint."""

    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> Size:
        """Return the size of the model that a configuration describes, stored in a dtype."""
        num_parameters = count_parameters(config)
        return cls(num_parameters, num_parameters * dtype.itemsize)

    @classmethod
    def of_base(cls, name: str, config: PretrainedConfig, dtype: torch.dtype, *, revision: str | None) -> Size:
        """Return the size of a base; of one that is stored quantised that of its files."""
        size = cls.of(config, dtype)
        if quantization_of(config) is None:
            return size
        files = {tensor.file for tensor in (stored_tensors(name, revision=revision) or {}).values()}
        logger.warning(
            "The base is stored quantised; the model that is written has plain weights in %s, %d bytes for each.",
            str(dtype).removeprefix("torch."),
            dtype.itemsize,
        )
        return cls(size.num_parameters, sum(file.stat().st_size for file in files) or size.num_bytes)

    def with_adapter(self, model: nn.Module) -> Size:
        """Add what is trainable in an adapted model."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Size(
            self.num_parameters + sum(p.numel() for p in trainable),
            self.num_bytes + sum(p.numel() * p.element_size() for p in trainable),
        )


@dataclass(frozen=True)
class ModelFigures(Size):
    """Size (of the weights as they are stored in a checkpoint) and likelihoods of one model of a run."""

    held_out_nll: float | None = None
    """Mean loss of a response token of the base's own vocabulary, in nats; None without held-out data."""
    held_out_standard_error: float | None = None
    """Standard error of that mean over rows; see `NLL`."""
    held_out_difference_error: float | None = None
    """Standard error of the difference to the base's `held_out_nll`, of the same rows (paired); None for the base."""
    num_held_out_tokens: int = 0
    held_out_nll_by_source: list[float | None] | None = None
    """The same loss on the held-out rows of each of several sources, in the order of `data.sources`; None for one that
    has none."""
    tokens_per_second: float | None = None
    """Number of held-out tokens, without padding, that a forward pass took in a second. The machine may have done other
    things meanwhile, so that no two models are compared by it."""
    flops_per_token: float | None = None
    """FLOPs of a forward pass for a token of a text of 2,048, or of what the model can read; None with an adapter."""
    gguf_bytes: dict[str, int] | None = None
    """Sizes that files for llama.cpp will have, by type; None with an adapter, and where there can be no such file."""
    general_nll: float | None = None
    """Mean loss of a token of the general text, in nats per token of the base's own vocabulary; None without one."""
    general_standard_error: float | None = None
    """Standard error of that mean over windows of 256 tokens."""
    general_difference_error: float | None = None
    """Standard error of the difference to the base's `general_nll`, of the same windows (paired); None for the base,
    and where a trimmed vocabulary has other windows."""
    num_general_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TuneRecord(Record):
    """Record of a run of `pat tune`. It keeps the last component of a path alone."""

    command: Literal["tune"] = "tune"
    model_name_or_path: str
    dataset: str
    recipe: str
    seed: int
    num_steps: int
    num_tokens_seen: int
    """Number of tokens, without padding, of the rows that were trained on, as often as they were. `num_tokens` in the
    log counts the same from the beginning of a sitting, or of the stage, on. With `include_num_input_tokens_seen`
    "all" it is an estimate."""
    prompt_format: str
    learning_rates: dict[str, float]
    """Highest learning rate of each group of parameters that was trained."""
    device: str
    dtype: str
    """Number format of the base's weights during training."""
    cut: Cut
    pat_config: dict[str, Any]
    training_arguments: dict[str, Any]
    data: DataRecord
    general_text: str | None = None
    """Name of the text that shows what was forgotten; `pat/general.txt` is the package's own."""
    figures: dict[str, ModelFigures]
    """Figures of the models `base`, `tuned` (masked or compact, with its adapter) and `dense`."""
    parity: Parity
    """Comparison of the tuned model with the dense one."""
    compaction: Compaction | None
    teacher: TeacherRecord | None
    """What the small model has learnt from beside its data, in stage two."""
    samples: list[Sample]
    """Greedy answers to held-out prompts, and those of the data; empty for texts without prompts, and where the
    vocabulary is trimmed."""
    timings: dict[str, float]
    log_history: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> TuneRecord | None:
        """Return the record in a file; None if there is none, or it is not one of this version."""
        parts: dict[str, Any] = {
            "machine": Machine,
            "cut": Cut,
            "parity": Parity,
            "compaction": Compaction,
            "teacher": TeacherRecord,
        }
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            facts |= {name: kind(**facts[name]) for name, kind in parts.items() if facts[name] is not None}
            facts["data"] = DataRecord.of(facts["data"])
            figures = {name: ModelFigures(**values) for name, values in facts["figures"].items()}
            return cls(**(facts | {"figures": figures}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


@dataclass(frozen=True)
class TuneResult:
    """Folder and record of a finished run."""

    output_dir: Path
    record: TuneRecord
    was_finished: bool = False
    """Whether the folder held all of it before."""

    @property
    def model_dir(self) -> Path:
        """Folder of the dense checkpoint."""
        return self.output_dir / MODEL

    @property
    def adapter_dir(self) -> Path:
        """Folder of the last adapter."""
        return self.output_dir / (ADAPTER if self.record.compaction is None else f"{COMPACT}/{ADAPTER}")

    @property
    def figures(self) -> dict[str, ModelFigures]:
        """Figures by stage, see `TuneRecord`."""
        return self.record.figures

    @property
    def parity(self) -> Parity:
        """Comparison of the tuned model with the dense one."""
        return self.record.parity
