"""What a training has come to, as it is handed to the merge and kept with the last adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from pat.checkpoint.card import Compaction, shown_name
from pat.checkpoint.compact import read_compaction
from pat.checkpoint.places import ADAPTER, COMPACT, RECORD
from pat.data.record import DataRecord
from pat.report.records import to_json
from pat.training.distillation.teacher import TeacherRecord
from pat.training.run.run_file import RunFile

TRAINING = "training.json"
"""Beside the last adapter: the facts of its training. The folder appears whole, so where it is, training is over."""


@dataclass(frozen=True)
class Trained:
    """A trained model, and what is on record of its training."""

    model: PeftModel
    """The masked model, or the compact one with its ordinary LoRA."""
    num_steps: int
    epoch: float
    log_history: list[dict[str, Any]]
    seconds: dict[str, float]
    """Seconds that each part took, over all sittings of a run that was interrupted (what was done after the checkpoint
    that it went on from, and had to be done again, counts once): `preparation` (of the rows, in each sitting),
    `calibration` (if there is no stage one, which includes it), `stage_one`, `compaction`, `stage_two`."""
    pat_config: dict[str, Any]
    run: RunFile
    data: DataRecord
    """What was trained on; of a stream until the end of training."""
    num_tokens_seen: int
    compaction: Compaction | None = None
    teacher: TeacherRecord | None = None

    def timings(self) -> dict[str, float]:
        """Return the seconds of each part, and of the training as a whole."""
        train = sum(seconds for part, seconds in self.seconds.items() if part != "preparation")
        return {"train_seconds": train, **{f"{part}_seconds": seconds for part, seconds in self.seconds.items()}}

    def write(self, folder: Path, asked_steps: int) -> None:
        """Write the facts beside the adapter, with the number of steps that were asked for."""
        facts = {name: getattr(self, name) for name in ("num_steps", "epoch", "log_history", "seconds", "pat_config")}
        paths = {name: self.pat_config.get(name) for name in ("base_model_name_or_path", "calibration")}
        facts["pat_config"] = self.pat_config | {name: path and shown_name(str(path)) for name, path in paths.items()}
        facts |= {"data": asdict(self.data), "num_tokens_seen": self.num_tokens_seen}
        facts |= {"asked_steps": asked_steps, "teacher": None if self.teacher is None else asdict(self.teacher)}
        (folder / TRAINING).write_text(to_json(facts), encoding="utf-8")

    @classmethod
    def of(cls, facts: Mapping[str, Any], model: PeftModel, run: RunFile, output_dir: Path) -> Trained:
        """Return the training whose facts a run's folder holds, with its model.

        Raises:
            PatError: the record of the compaction is not readable.
        """
        teacher = facts["teacher"]
        return cls(
            model,
            facts["num_steps"],
            facts["epoch"],
            facts["log_history"],
            facts["seconds"],
            facts["pat_config"],
            run,
            DataRecord.of(facts["data"]),
            facts["num_tokens_seen"],
            read_compaction(output_dir / COMPACT) if _is_compact(output_dir) else None,
            None if teacher is None else TeacherRecord(**teacher),
        )


def last_adapter(output_dir: Path) -> Path:
    """Return the folder of a run's last adapter, be it there or not."""
    return output_dir / COMPACT / ADAPTER if _is_compact(output_dir) else output_dir / ADAPTER


def training_facts(output_dir: Path, num_steps: int, *, no_compact: bool = False) -> dict[str, Any] | None:
    """Return the facts of the training that a run's folder holds; None unless it is over, after so many steps."""
    if (no_compact and _is_compact(output_dir)) or not (output_dir / ADAPTER / CONFIG_NAME).is_file():
        return None
    try:
        facts = json.loads((last_adapter(output_dir) / TRAINING).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_over = isinstance(facts, dict) and facts.get("asked_steps") == num_steps and "data" in facts
    return facts if is_over else None


def _is_compact(output_dir: Path) -> bool:
    return (output_dir / COMPACT / RECORD).is_file()
