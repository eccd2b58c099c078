"""The paper's 14 tasks on a loaded model: a thin call of lm-evaluation-harness on the task files in `tasks/`."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pat.errors import PatError
from pat.evaluation.options import ANSWERS, BATCH_SIZE, PROTOCOLS
from pat.nll import evaluating
from pat.paths import near
from pat.questions import evenly_spaced, resolve_tasks
from pat.report.records import plain

SAMPLES = "samples"
"""Folder of the harness's own results and answers."""

TASK_FILES = Path(__file__).parent / "tasks"
"""The folder that stock `lm_eval` takes as `--include_path`."""

logger = logging.getLogger(__name__)

METRICS = ("acc", "acc_norm", "no_letter")


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one model on one task under one protocol. Accuracies and shares are fractions of 1."""

    task: str
    protocol: str
    num_questions: int
    num_truncated: int
    """Number of questions that lost their beginning, because the model reads fewer tokens."""
    acc: float
    acc_stderr: float | None
    """Standard error of the mean; None for a single question."""
    acc_norm: float | None
    """Accuracy of the choice that is likeliest per character; None under the letter protocol."""
    acc_norm_stderr: float | None
    no_letter: float | None
    """Share of answers without any letter, which count as wrong; None under the likelihood protocol."""


@dataclass(frozen=True)
class TaskScores:
    """All scores of one model."""

    limit: int | None
    """Number of questions asked of each task, evenly spaced; None for all."""
    mean: dict[str, dict[str, float | None]]
    """Unweighted mean over the tasks, by protocol and metric; None for a metric that the protocol has not."""
    mean_stderr: dict[str, dict[str, float | None]]
    """Standard error of the mean, since tasks are independent; None where a task has none."""
    scores: tuple[TaskScore, ...]

    @classmethod
    def of(cls, scores: Sequence[TaskScore], limit: int | None) -> TaskScores:
        """Return scores with their means."""
        mean: dict[str, dict[str, float | None]] = {}
        mean_stderr: dict[str, dict[str, float | None]] = {}
        for protocol in dict.fromkeys(score.protocol for score in scores):
            own = [score for score in scores if score.protocol == protocol]
            for metric in METRICS:
                values = [getattr(score, metric) for score in own]
                errors: list[Any] = [getattr(score, f"{metric}_stderr", None) for score in own]
                mean.setdefault(protocol, {})[metric] = None if None in values else sum(values) / len(own)
                stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(own)
                mean_stderr.setdefault(protocol, {})[metric] = stderr
        return cls(limit, mean, mean_stderr, tuple(scores))


def load_tasks(
    tasks: str | Sequence[str], protocols: Sequence[str] = PROTOCOLS, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Return tasks of lm-evaluation-harness by name, each with its questions, before a model is loaded.

    Args:
        tasks: names, or `paper` for all 14.
        protocols: `letter`, `likelihood`, or both; see `tasks/_letter.yaml` and `tasks/_likelihood.yaml`.
        data_dir: folder with a `<task>.jsonl` for each task; without one the questions come from the hub.

    Raises:
        PatError: an unknown task, no lm-evaluation-harness, or questions that cannot be read.
    """
    names = resolve_tasks(tasks)
    if importlib.util.find_spec("lm_eval") is None:
        raise PatError(
            "The tasks need lm-evaluation-harness, which is not installed; run `pip install 'pat-llm[evaluation]'`."
        )
    if data_dir is not None and not os.path.isdir(data_dir):
        alike = near(data_dir, folder=True)
        raise PatError(f"{data_dir}: no such folder{alike}; give a --data_dir that holds a <task>.jsonl for each task.")
    from lm_eval.tasks import TaskManager

    metadata = {} if data_dir is None else {"data_dir": str(data_dir)}
    with _quiet_harness():
        manager = TaskManager(include_path=TASK_FILES, include_defaults=False, metadata=metadata)
        loaded = manager.load([f"pat_{name}_{protocol}" for name in names for protocol in protocols])
    return dict(loaded["tasks"])


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Mapping[str, Any],
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    output_dir: Path | None = None,
    log_samples: bool = False,
) -> TaskScores:
    """Measure the accuracy of a causal language model on tasks.

    Args:
        model: of transformers, or of peft around one; every submodule's mode is as before afterwards.
        tokenizer: of the model.
        tasks: what `load_tasks` returned.
        limit: number of questions asked of each task, evenly spaced; stock `lm_eval --limit` takes the first ones.
        batch_size: rows of a forward pass. Log-likelihoods depend on it by rounding.
        output_dir: folder in which the harness keeps answers, which are not asked for again.
        log_samples: also write the harness's own results and the answer to every question there.
    """
    from lm_eval import evaluate
    from lm_eval.api.model import CachingLM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    spaced = {name: evenly_spaced(len(task.eval_docs), limit) for name, task in tasks.items()}
    with evaluating(model), _quiet_harness():
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        asked: Any = language_model
        if output_dir is not None:
            asked = CachingLM(asked, str(output_dir / f"{ANSWERS}{_fingerprint(model, tokenizer)[:16]}.db"))
        results: Any = evaluate(asked, {"tasks": tasks}, samples=None if limit is None else spaced)
    samples = results.pop("samples")
    scores = [_score(name, results["results"][name], samples[name], language_model) for name in tasks]
    if log_samples and output_dir is not None:
        tracker = EvaluationTracker(output_path=str(output_dir / SAMPLES / "results.json"))  # the names get a date
        tracker.save_results_aggregated(results, samples)
        for name in tasks:
            tracker.save_results_samples(name, samples[name])
    cut = dict.fromkeys((score.task for score in scores), 0)
    for score in scores:  # by letter or by likelihood
        cut[score.task] = max(cut[score.task], score.num_truncated)
    if any(cut.values()):
        counts = ", ".join(f"{number:,} of {task}" for task, number in cut.items() if number)
        logger.warning("Questions lost their beginning, which the model has no room for: %s.", counts)
    return TaskScores.of(scores, limit)


def _score(
    name: str, figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], language_model: Any
) -> TaskScore:
    task, _, protocol = name.removeprefix("pat_").rpartition("_")
    numbers: dict[str, Any] = {field.name: figures.get(f"{field.name},none") for field in fields(TaskScore)}
    numbers |= {metric: None for metric, number in numbers.items() if isinstance(number, str)}  # "N/A"
    numbers |= {"num_questions": len(samples), "num_truncated": _num_truncated(language_model, samples)}
    return TaskScore(**numbers | {"task": task, "protocol": protocol})


def _num_truncated(language_model: Any, samples: Sequence[Mapping[str, Any]]) -> int:
    """Return of how many questions the harness dropped the beginning."""

    def is_too_long(request: tuple[str, Any]) -> bool:
        text, rest = request
        if isinstance(rest, str):  # a continuation, whose last token is only predicted
            return bool(len(language_model.tok_encode(text + rest)) > language_model.max_length + 1)
        return bool(len(language_model.tok_encode(text)) > language_model.max_length - rest["max_gen_toks"])

    return sum(any(map(is_too_long, sample["arguments"])) for sample in samples)


def _fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that an answer depends on beside the question: weights, configurations and tokenizer."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    configs = [getattr(model, "config", None), *getattr(model, "peft_config", {}).values()]
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    reading = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for name in ("padding", "truncation"):  # changes with every call
        reading.pop(name, None)
    settings = [config.to_dict() for config in configs if config is not None]
    settings += [reading, tokenizer.special_tokens_map, {"lm_eval": version("lm_eval")}]
    digest.update(json.dumps(plain(settings)).encode())  # a set (peft's target modules) has an order of its own
    return digest.hexdigest()


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep what the harness says about its own workings off the screen, and its bars unless somebody is looking."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        harness.setLevel(level)
