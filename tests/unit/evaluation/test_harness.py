"""`evaluate_tasks`: the answers of a plain loop, limited, resumed without a repetition, refused in one line."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from plain_answers import best, plain_letter, plain_likelihoods
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat.errors import PatError
from pat.evaluation.harness import TaskScore, TaskScores, _fingerprint, evaluate_tasks, load_tasks
from pat.evaluation.options import PROTOCOLS
from pat.questions import TASKS

MAX_POSITIONS = 512

SAME = 1e-3
"""Nats: float32 sums of log-probabilities, in the order of another batch."""

Run = Callable[..., TaskScores]


@pytest.fixture
def run(lettered_path: Path, tests_data: Path) -> Run:
    def evaluate(tasks: str | list[str] = "paper", protocols: Sequence[str] = PROTOCOLS, **options: Any) -> TaskScores:
        loaded = load_tasks(tasks, protocols, options.pop("data_dir", tests_data / "tasks"))
        model = AutoModelForCausalLM.from_pretrained(lettered_path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(lettered_path)
        return evaluate_tasks(model, tokenizer, tasks=loaded, **options)

    return evaluate


def score_of(scores: TaskScores, task: str) -> TaskScore:
    (score,) = (score for score in scores.scores if score.task == task)
    return score


def samples_of(folder: Path, task: str, protocol: str) -> list[dict[str, Any]]:
    (file,) = (folder / "samples").glob(f"samples_pat_{task}_{protocol}_*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def questions(tests_data: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tests_data / "tasks" / f"{task}.jsonl").read_text().splitlines()]


@pytest.fixture
def plain(lettered_path: Path) -> Callable[[str, Mapping[str, Any]], Any]:
    model = AutoModelForCausalLM.from_pretrained(lettered_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(lettered_path)

    def answer(protocol: str, row: Mapping[str, Any]) -> Any:
        return {"letter": plain_letter, "likelihood": plain_likelihoods}[protocol](model, tokenizer, row, MAX_POSITIONS)

    return answer


def test_every_answer_by_letter_is_the_plain_one(
    run: Run, plain: Callable[..., Any], tests_data: Path, tmp_path: Path
) -> None:
    tasks = ["boolq", "siqa", "mmlu"]
    scores = run(tasks=tasks, protocols=["letter"], batch_size=4, output_dir=tmp_path, log_samples=True)
    said = set()
    for task in tasks:
        rows, samples = questions(tests_data, task), samples_of(tmp_path, task, "letter")
        answers = [plain("letter", row) for row in rows]
        for answer, sample in zip(answers, samples, strict=True):
            assert sample["filtered_resps"][0].startswith(answer.text)  # the harness goes on after the letter
        said |= {answer.letter for answer in answers}
        score = score_of(scores, task)
        right = ["ABCD"[row["answer"]] == answer.letter for row, answer in zip(rows, answers, strict=True)]
        assert score.acc == pytest.approx(sum(right) / len(rows))
        assert score.no_letter == pytest.approx(sum(answer.letter is None for answer in answers) / len(rows))
        assert score.num_questions == len(rows) and score.acc_norm is None
        assert score.num_truncated == (task == "boolq")  # whose last question is longer than the model reads
    assert {None, "A", "B", "C"} <= said  # a model that always says the same shows nothing


def test_every_likelihood_is_the_plain_one(
    run: Run, plain: Callable[..., Any], tests_data: Path, tmp_path: Path
) -> None:
    tasks = ["boolq", "mmlu"]
    scores = run(tasks=tasks, protocols=["likelihood"], batch_size=4, output_dir=tmp_path, log_samples=True)
    differ = False
    for task in tasks:
        right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
        for row, sample in zip(questions(tests_data, task), samples_of(tmp_path, task, "likelihood"), strict=True):
            values = plain("likelihood", row)
            assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(values, abs=SAME)
            per_character = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
            right["acc"].append(best(values)[0] == row["answer"])
            right["acc_norm"].append(best(per_character)[0] == row["answer"])
        score = score_of(scores, task)
        assert score.no_letter is None
        for metric, answers in right.items():
            assert getattr(score, metric) == pytest.approx(sum(answers) / len(answers))
        differ |= right["acc"] != right["acc_norm"]
    assert differ


def test_every_task_has_a_file_for_each_protocol(run: Run) -> None:
    scores = run(limit=1)
    assert [(score.task, score.protocol) for score in scores.scores] == list(product(TASKS, PROTOCOLS))
    assert all(score.num_questions == 1 and score.acc_stderr is None for score in scores.scores)
    assert scores.mean_stderr["letter"]["acc"] is None


def test_a_limit_takes_evenly_spaced_questions(run: Run, tests_data: Path, tmp_path: Path) -> None:
    scores = run(tasks="copa", protocols=["likelihood"], limit=3, output_dir=tmp_path, log_samples=True)
    assert scores.limit == 3 and scores.scores[0].num_questions == 3
    rows = questions(tests_data, "copa")
    samples = samples_of(tmp_path, "copa", "likelihood")
    assert [sample["doc"]["stem"] for sample in samples] == [rows[index]["stem"] for index in (0, 3, 6)]


def test_an_interrupted_evaluation_goes_on_and_asks_nothing_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tasks": "copa,siqa", "output_dir": tmp_path, "batch_size": 4}
    whole = run(**options | {"output_dir": None})
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.models.huggingface.postprocess_generated_text", _fail_after(6, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(**options)
    asked: list[int] = []
    original = HFLM.generate_until
    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "generate_until", lambda self, some: asked.append(len(some)) or original(self, some))
        assert run(**options) == whole
    assert asked == [18 - 6]
    monkeypatch.setattr(HFLM, "generate_until", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(HFLM, "loglikelihood", lambda *_: pytest.fail("asked again"))
    assert run(**options) == whole
    assert run(**options, protocols=["letter"]).scores == tuple(s for s in whole.scores if s.protocol == "letter")


def _fail_after(count: int, error: type[BaseException]) -> Callable[..., str]:
    calls: list[None] = []

    def process(generation: str, **_: Any) -> str:
        calls.append(None)
        if len(calls) > count:
            raise error
        return generation

    return process


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "wording"])
def test_answers_of_something_else_are_not_taken(
    changed: str, lettered_path: Path, tests_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(lettered_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(lettered_path)

    def evaluate(folder: Path) -> None:
        evaluate_tasks(model, tokenizer, tasks=load_tasks("copa", ["likelihood"], folder), output_dir=tmp_path)

    evaluate(tests_data / "tasks")
    tokenizer("padded and cut", padding="max_length", truncation=True, max_length=8)  # is no other tokenizer
    monkeypatch.setattr(HFLM, "loglikelihood", lambda *_: pytest.fail("asked again"))
    evaluate(tests_data / "tasks")
    folder = tests_data / "tasks"
    if changed == "weights":
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[17, 5] += 0.1
    elif changed == "tokenizer":
        tokenizer.add_tokens(["bird"])
    else:
        folder = tmp_path / "questions"
        folder.mkdir()
        text = (tests_data / "tasks" / "copa.jsonl").read_text()
        (folder / "copa.jsonl").write_text(text.replace("It was cold outside.", "It was warm outside."))
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        evaluate(folder)


def test_the_order_of_target_modules_makes_no_other_model(tests_data: Path) -> None:
    """A set of names has another order in every process; that of these numbers depends on which came first."""
    tokenizer = AutoTokenizer.from_pretrained(tests_data / "stories260K")
    assert list({0, 8}) != list({8, 0})
    digests = set()
    for modules in ({0, 8}, {8, 0}, {0, 9}):
        model = nn.Linear(2, 2, bias=False)
        nn.init.ones_(model.weight)
        model.peft_config = {"default": SimpleNamespace(to_dict=lambda modules=modules: {"target_modules": modules})}
        digests.add(_fingerprint(model, tokenizer))
    assert len(digests) == 2


def test_every_modules_mode_and_the_random_state_are_as_before(lettered_path: Path, tests_data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lettered_path, dtype=torch.float32).train()
    model.lm_head.eval()
    state = torch.get_rng_state()
    tokenizer = AutoTokenizer.from_pretrained(lettered_path)
    evaluate_tasks(model, tokenizer, tasks=load_tasks("copa", data_dir=tests_data / "tasks"), limit=2)
    assert model.training and not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_weighs_tasks_not_questions() -> None:
    scores = [
        TaskScore(name, "letter", n, 0, acc, error, None, None, 0.0)
        for name, n, acc, error in (("a", 1, 1.0, 0.3), ("b", 9, 0.0, 0.4))
    ]
    record = TaskScores.of(scores, None)
    assert record.mean == {"letter": {"acc": 0.5, "acc_norm": None, "no_letter": 0.0}}
    assert record.mean_stderr["letter"] == {"acc": pytest.approx(0.25), "acc_norm": None, "no_letter": None}


def test_a_folder_that_is_not_there_is_named(run: Run) -> None:
    with pytest.raises(PatError, match="/nowhere: no such folder"):
        run(tasks="copa", data_dir="/nowhere")


def test_without_the_harness_the_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PatError, match=r"pip install 'pat-llm\[evaluation\]'"):
        run(tasks="copa")
