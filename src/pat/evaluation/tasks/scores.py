"""Accuracies on tasks: records, and the files that make an evaluation resumable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pat.errors import PatError
from pat.evaluation.tasks.fingerprints import fingerprint_rows
from pat.questions.hub import Row

SCORES, SAMPLES = "scores", "samples"
"""Folders of finished scores and of the answers behind them."""


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one model on one task under one protocol, as fractions of 1."""

    task: str
    protocol: str
    num_questions: int
    acc: float
    acc_stderr: float | None
    """Standard error of the mean; None for a single question."""
    acc_norm: float | None
    """Choices compared by likelihood per character; None under the letter protocol."""
    acc_norm_stderr: float | None
    seconds: float
    num_without_letter: int | None = None
    """Questions answered without any letter, which count as wrong; None under the likelihood protocol."""


@dataclass(frozen=True)
class TaskEvaluation:
    """All scores of one model."""

    scores: tuple[TaskScore, ...]
    limit: int | None
    """So many questions of each task, evenly spaced; None for all."""

    def mean(self, protocol: str, metric: str = "acc") -> float | None:
        """Return the unweighted mean over the tasks, or None if a protocol has no such metric."""
        values = [getattr(score, metric) for score in self.scores if score.protocol == protocol]
        return fmean(values) if values and None not in values else None

    def mean_stderr(self, protocol: str, metric: str = "acc") -> float | None:
        """Return the standard error of `mean`: tasks are independent. None if any task has none."""
        errors = [getattr(score, f"{metric}_stderr") for score in self.scores if score.protocol == protocol]
        return math.hypot(*errors) / len(errors) if errors and None not in errors else None

    def get(self, task: str, protocol: str) -> TaskScore | None:
        """Return one score, if it was measured."""
        return next((s for s in self.scores if (s.task, s.protocol) == (task, protocol)), None)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order asked for."""
        return list(dict.fromkeys(score.task for score in self.scores))

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols, in the order asked for."""
        return list(dict.fromkeys(score.protocol for score in self.scores))

    def to_dict(self) -> dict[str, Any]:
        """Return the scores ready for JSON, means and their standard errors included."""
        means = {
            protocol: {metric: self.mean(protocol, metric) for metric in ("acc", "acc_norm")}
            for protocol in self.protocols
        }
        errors = {
            protocol: {metric: self.mean_stderr(protocol, metric) for metric in ("acc", "acc_norm")}
            for protocol in self.protocols
        }
        scores = [asdict(score) for score in self.scores]
        return {"limit": self.limit, "mean": means, "mean_stderr": errors, "scores": scores}


class ScoreStore:
    """Finished scores in a folder, each with the settings it belongs to."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.settings = dict(settings)

    def samples_path(self, score: TaskScore) -> Path:
        """Return the file for the answers behind a score; only a store with a folder has one."""
        assert self.folder is not None
        return self.folder / SAMPLES / f"{score.task}.{score.protocol}.jsonl"

    def read(self, task: str, protocol: str, rows: Sequence[Row]) -> TaskScore | None:
        """Return a finished score, or None.

        Raises:
            PatError: the folder holds this score of another model, of other questions, or what is no score.
        """
        path = self._path(task, protocol)
        if path is None or not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            score, settings = TaskScore(**stored["score"]), stored["settings"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PatError(f"{path}: is not a finished score ({error}); remove it or choose another folder.") from error
        expected = self._settings(rows)
        different = sorted(name for name in expected if settings.get(name) != expected[name])
        if different:
            hint = " (--limit, --data_dir)" if "questions" in different else ""
            raise PatError(
                f"{path}: is a score with other {' and '.join(different)}{hint}; choose another --output_dir, or "
                "remove what is in this one."
            )
        return score

    def write(self, score: TaskScore, rows: Sequence[Row], samples: Iterable[Mapping[str, Any]] | None) -> None:
        """Keep a score, and before it the answers if there are any."""
        path = self._path(score.task, score.protocol)
        if path is None:
            return
        if samples is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            _write_whole(self.samples_path(score), lines)
        record = {"settings": self._settings(rows), "score": asdict(score)}
        _write_whole(path, json.dumps(record, indent=2) + "\n")

    def _settings(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.settings | {"questions": fingerprint_rows(rows)}

    def _path(self, task: str, protocol: str) -> Path | None:
        return None if self.folder is None else self.folder / SCORES / f"{task}.{protocol}.json"


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is there either whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another run may write the same
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
