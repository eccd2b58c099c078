"""The tasks on stories260K: every answer is that of a plain loop, and of lm-evaluation-harness's own model."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from plain_answers import best, plain_letter, plain_likelihoods
from torch import Tensor, nn

from pat.evaluation.tasks import evaluate_tasks
from pat.evaluation.tasks.protocols import first_letter, task_config
from pat.questions.hub import LETTERS
from pat.questions.rows import load_rows
from pat.questions.table import TASKS

MAX_POSITIONS = 512

NEAR_TIE = 1e-3
"""Two choices or tokens this close may change places: float32 sums depend on the order of a batch."""

LIMIT = 3

LIMIT_OF_HARNESS = 20


class Biased(nn.Module):
    """A model that writes capital letters more often than stories do; of no class that transformers knows."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.config, self.generation_config = model, model.config, model.generation_config
        bias = torch.zeros(model.config.vocab_size)
        for letter in "ABCD":
            bias[tokenizer.convert_tokens_to_ids(letter)] = 7.0
        self.register_buffer("bias", bias)

    def forward(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        output = self.model(input_ids=input_ids, **options)
        return SimpleNamespace(logits=output.logits + self.bias, past_key_values=output.past_key_values)


def read_samples(folder: Path, task: str, protocol: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / f"{task}.{protocol}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_tasks_agree_with_a_plain_loop(stories260k: Any, shared_data: Path, tmp_path: Path) -> None:
    base, tokenizer = stories260k
    model, data_dir = Biased(base, tokenizer).eval(), shared_data / "eval" / "tasks"
    evaluation = evaluate_tasks(
        model, tokenizer, data_dir=data_dir, limit=LIMIT, log_samples=True, output_dir=tmp_path, progress=False
    )
    assert evaluation.tasks == list(TASKS) and len(evaluation.scores) == 28
    letters = set()
    for name, task in TASKS.items():
        rows = load_rows(task, data_dir, limit=LIMIT)
        samples = (read_samples(tmp_path, name, protocol) for protocol in ("letter", "likelihood"))
        for row, letter, likelihood in zip(rows, *samples, strict=True):
            answer = plain_letter(model, tokenizer, row, MAX_POSITIONS)
            letters.add(answer.letter)
            assert answer.gap < NEAR_TIE or (letter["prediction"], letter["text"]) == (answer.letter, answer.text)
            values = plain_likelihoods(model, tokenizer, row, MAX_POSITIONS)
            assert likelihood["log_likelihoods"] == pytest.approx(values, abs=NEAR_TIE)
            index, gap = best(values)
            assert gap < NEAR_TIE or likelihood["prediction"] == LETTERS[index]
    assert len(letters) > 1  # a model that always says the same shows nothing


@pytest.fixture
def lettered(stories260k: Any) -> tuple[Any, Any]:
    """The stock model, whose output layer says capital letters more often than stories do."""
    model, tokenizer = stories260k
    bias = torch.zeros(model.config.vocab_size)
    bias[tokenizer.convert_tokens_to_ids(list("ABCD"))] = torch.tensor([5.0, 5.0, 8.0, 8.0])
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return model, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["letter", "likelihood"])
def test_the_harness_itself_measures_the_same(
    protocol: str, lettered: tuple[Any, Any], shared_data: Path, tmp_path: Path
) -> None:
    """All 14 tasks: the same task files, asked by the harness's own HFLM, one question at a time."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = lettered
    data_dir = shared_data / "eval" / "tasks"
    evaluation = evaluate_tasks(
        model,
        tokenizer,
        protocols=protocol,
        data_dir=data_dir,
        limit=LIMIT_OF_HARNESS,
        log_samples=True,
        output_dir=tmp_path,
        progress=False,
    )
    rows = {name: load_rows(task, data_dir, limit=LIMIT_OF_HARNESS) for name, task in TASKS.items()}
    tasks = [ConfigurableTask(config=task_config(name, protocol, rows[name]) | {"task": name}) for name in TASKS]
    stock = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), tasks=tasks, bootstrap_iters=1)
    assert stock is not None
    said = set()
    for name in TASKS:
        figures, ours = stock["results"][name], evaluation.get(name, protocol)
        assert ours is not None and ours.num_questions == len(rows[name]) >= LIMIT_OF_HARNESS
        assert (ours.acc, ours.acc_norm) == (figures["acc,none"], figures.get("acc_norm,none"))
        assert ours.acc_stderr == pytest.approx(figures["acc_stderr,none"])
        samples = zip(stock["samples"][name], read_samples(tmp_path, name, protocol), rows[name], strict=True)
        for sample, own, row in samples:
            said.add(own["prediction"])
            if protocol == "letter":
                assert own["prediction"] == first_letter(sample["filtered_resps"][0], len(row["choices"]))
            else:
                expected = [response[0] for response in sample["filtered_resps"]]
                assert own["log_likelihoods"] == pytest.approx(expected, abs=NEAR_TIE)
    assert len(said) > 2, said
