"""The 14 tasks on a loaded model, through lm-evaluation-harness."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pat.errors import PatError
from pat.evaluation.tasks.fingerprints import fingerprint_model, fingerprint_tokenizer
from pat.evaluation.tasks.protocols import (
    PROTOCOLS,
    fingerprint_wording,
    first_letter,
    is_decided,
    resolve_protocols,
    task_config,
)
from pat.evaluation.tasks.scores import ScoreStore, TaskEvaluation, TaskScore
from pat.nll import evaluating
from pat.questions.hub import LETTERS, Row
from pat.questions.rows import load_rows
from pat.questions.table import PAPER, EvalTask, resolve_tasks

CPU_BATCH_SIZE = 16
ACCELERATOR_BATCH_SIZE = 64


def check_harness() -> None:
    """Raise `PatError` if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PatError(
            "The tasks need lm-evaluation-harness, which is not installed; run `pip install 'pat-llm[evaluation]'`."
        )


def load_questions(
    tasks: str | Sequence[str], data_dir: str | Path | None, limit: int | None = None
) -> dict[EvalTask, list[Row]]:
    """Return the questions of some tasks, so that what is wrong with them is found before a model is loaded.

    Raises:
        PatError: unknown task, no lm-evaluation-harness, or questions that cannot be read.
    """
    chosen = resolve_tasks(tasks)
    check_harness()
    if limit is not None and limit < 1:
        raise PatError(f"Got limit={limit}; expected a whole number above 0.")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise PatError(f"{data_dir}: no such folder; give a --data_dir that holds a <task>.jsonl for each task.")
    return {task: load_rows(task, folder, limit=limit) for task in chosen}


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: str | Sequence[str] | Mapping[EvalTask, Sequence[Row]] = PAPER,
    protocols: str | Sequence[str] = PROTOCOLS,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    log_samples: bool = False,
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> TaskEvaluation:
    """Measure the accuracy of a causal language model on tasks.

    Args:
        model: a module with a `config` that takes `input_ids`, `attention_mask`, `position_ids`, `past_key_values` and
            `use_cache` and returns `.logits` (and `.past_key_values`); every submodule's mode is as before afterwards.
        tasks: names, or `paper` for all 14; or questions already loaded by `load_questions`.
        protocols: `letter`, `likelihood`, or both; see `pat.evaluation.tasks.protocols`.
        data_dir: folder with a `<task>.jsonl` for each task; without one the data comes from the hub.
        limit: so many questions of each task, evenly spaced.
        batch_size: rows of a forward pass.
        device: where to compute; by default where the model is.
        log_samples: keep the answer to every question in `output_dir`.
        output_dir: where finished scores are kept; started again with it, the same evaluation repeats none of them.
        progress: draw a bar for each task, and print a line when it is done, on standard error.

    Raises:
        PatError: see `load_questions`; unknown protocol; answers to be kept but no folder; the folder holds scores of
            something else.
    """
    names = resolve_protocols(protocols)
    questions = tasks if isinstance(tasks, Mapping) else load_questions(tasks, data_dir, limit)
    check_harness()
    if log_samples and output_dir is None:
        raise PatError("Got log_samples without output_dir; expected a folder for the answers.")
    if batch_size is not None and batch_size < 1:
        raise PatError(f"Got batch_size={batch_size}; expected a whole number above 0.")
    if device is not None:
        model = model.to(device)
    store = ScoreStore(None, {}) if output_dir is None else ScoreStore(Path(output_dir), _settings(model, tokenizer))
    cells = [(task, protocol) for task in questions for protocol in names]
    finished = {
        (task, protocol): score
        for task, protocol in cells
        if (score := store.read(task.name, protocol, questions[task])) is not None
        and not (log_samples and not store.samples_path(score).is_file())
    }
    scores = []
    with evaluating(model):
        for number, (task, protocol) in enumerate(cells, start=1):
            score = finished.get((task, protocol))
            if score is None:
                label = f"{task.name}, {protocol} ({number}/{len(cells)})"
                score, samples = _measure(
                    model, tokenizer, task, protocol, questions[task], batch_size=batch_size, label=label, show=progress
                )
                store.write(score, questions[task], samples if log_samples else None)
            scores.append(score)
    return TaskEvaluation(tuple(scores), limit)


def _settings(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a score depends on, but for the questions."""
    return {
        "model": fingerprint_model(model),
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "wording": fingerprint_wording(),
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def _measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: EvalTask,
    protocol: str,
    rows: Sequence[Row],
    *,
    batch_size: int | None,
    label: str,
    show: bool,
) -> tuple[TaskScore, Iterator[dict[str, Any]]]:
    """Ask one task's questions; return the score and, to be drawn from, what was answered to each."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    from pat.evaluation.tasks.adapter import BatchedLM

    if batch_size is None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        batch_size = CPU_BATCH_SIZE if on_cpu else ACCELERATOR_BATCH_SIZE
    started = time.perf_counter()
    # The harness draws bars of its own whether anybody looks or not; ours goes to the stream that it cannot reach.
    with tqdm(desc=label, disable=None if show else True, leave=False, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with _quiet_harness():
            harness_task = ConfigurableTask(config=task_config(task.name, protocol, rows))
            adapter = BatchedLM(model, tokenizer, batch_size=batch_size, is_decided=is_decided, progress=report)
            # 1: no bootstrap, but the standard error of a mean, which has a formula.
            results: Any = evaluate(adapter, {"tasks": {task.name: harness_task}}, bootstrap_iters=1, log_samples=True)
    figures, samples = results["results"][task.name], results["samples"][task.name]
    score = TaskScore(
        task=task.name,
        protocol=protocol,
        num_questions=len(samples),
        acc=float(figures["acc,none"]),
        acc_stderr=_number(figures.get("acc_stderr,none")),
        acc_norm=_number(figures.get("acc_norm,none")),
        acc_norm_stderr=_number(figures.get("acc_norm_stderr,none")),
        seconds=time.perf_counter() - started,
        num_without_letter=_count_without_letter(samples) if protocol == "letter" else None,
    )
    if show:
        tqdm.write(f"{label}: {score.acc:.3f} on {len(samples)} questions, {score.seconds:.1f} s", file=sys.stderr)
    return score, (_answer(sample, protocol) for sample in samples)


def _answer(sample: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Return what a log keeps of one question."""
    row = sample["doc"]
    answer = {"question": sample["doc_id"], "prompt": sample["arguments"][0][0], "answer": LETTERS[row["answer"]]}
    if protocol == "letter":
        text = sample["filtered_resps"][0]
        letter = first_letter(text, len(row["choices"]))
        return answer | {"prediction": letter, "text": text, "correct": bool(sample["acc"])}
    likelihoods = [response[0] for response in sample["filtered_resps"]]
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    return answer | {
        "prediction": LETTERS[best],
        "choices": list(row["choices"]),
        "log_likelihoods": likelihoods,
        "correct": bool(sample["acc"]),
        "correct_norm": bool(sample["acc_norm"]),
    }


def _count_without_letter(samples: Iterable[Mapping[str, Any]]) -> int:
    return sum(first_letter(each["filtered_resps"][0], len(each["doc"]["choices"])) is None for each in samples)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep what the harness says about its own workings off the screen."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
