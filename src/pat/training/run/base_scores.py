"""Keeps what the base scores and answers among the checkpoints, so that a run that goes on need not ask it again."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pat.kinds import misfits
from pat.training.inputs.prepare import Prepared
from pat.training.outcome.measure import general_rows, measure
from pat.training.outcome.results import ModelFigures, Size
from pat.training.outcome.samples import greedy_answers
from pat.training.run.run_file import RunFile
from pat.whole_files import write_whole

BASE_SCORES = "base.json"
"""File among the checkpoints of a run. What it depends on may not change within one, but for `dtype`; its digest is
that of these figures for this base and data, so that neither others' nor edited ones are taken over."""


@dataclass(frozen=True)
class BaseScores:
    """Figures and answers of the base model of a run."""

    dtype: str
    """Number format in which it was loaded."""
    figures: ModelFigures
    rows: list[list[float]] | None
    """For each held-out example the sum of its losses in nats, and its scored tokens; None without such examples."""
    general: list[list[float]] | None = None
    """The same for each window of general text; None without it."""
    answers: list[list[str]] | None = None
    """Prompts, each with the greedy answer to it; None before it has been asked."""

    @classmethod
    def of(cls, model: PreTrainedModel, data: Prepared, size: Size) -> BaseScores:
        """Score a base model, before its vocabulary is fitted to the data."""
        losses: dict[str, torch.Tensor] = {}
        figures = measure(model, data, "base", size, losses)
        rows, general = (losses.get(name) for name in ("base", general_rows("base")))
        return cls(
            str(model.dtype),
            figures,
            None if rows is None else rows.tolist(),
            None if general is None else general.tolist(),
        )

    def with_answers(self, model: PreTrainedModel, data: Prepared) -> BaseScores:
        """Return a copy with the base's answers, once its vocabulary has been fitted to the data."""
        return replace(self, answers=[list(pair) for pair in greedy_answers(model, data)])

    @classmethod
    def read(cls, checkpoints: Path, run: RunFile, model: PreTrainedModel) -> BaseScores | None:
        """Return what is kept of the base of a run, loaded in the same number format; None if nothing fits."""
        try:
            stored = json.loads((checkpoints / BASE_SCORES).read_text(encoding="utf-8"))
            content = stored["scores"]
            if stored["digest"] != _digest(content, run) or misfits(content, cls):
                return None
            kept = cls(**(content | {"figures": ModelFigures(**content["figures"])}))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return kept if kept.dtype == str(model.dtype) else None

    def write(self, checkpoints: Path, run: RunFile) -> None:
        """Keep it among the checkpoints of a run."""
        content = asdict(self)
        path, text = checkpoints / BASE_SCORES, json.dumps({"digest": _digest(content, run), "scores": content}) + "\n"
        with suppress(OSError, ValueError):
            if path.read_text(encoding="utf-8") == text:
                return
        checkpoints.mkdir(exist_ok=True)
        write_whole(path, text)

    def losses(self) -> dict[str, torch.Tensor]:
        """Return the losses of the base on examples and windows, `(rows, 2)` in float64 each, see `measure`."""
        known = {"base": self.rows, general_rows("base"): self.general}
        return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in known.items() if rows is not None}


def _digest(content: Any, run: RunFile) -> str:
    """Digest figures, and what they depend on: the base, the data and their tokens."""
    facts = json.dumps([content, run.base, run.data, run.tokens], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()
