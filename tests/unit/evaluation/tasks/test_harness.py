"""`evaluate_tasks` on a tiny model: the plain answers, resumed without a repetition, refused in one line."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from plain_answers import best, plain_letter, plain_likelihoods
from tiny_models import build, tiny_tokenizer
from torch import nn

from pat.errors import PatError
from pat.evaluation.tasks import TaskEvaluation, TaskScore, evaluate_tasks, harness
from pat.evaluation.tasks.report import score_table
from pat.evaluation.tasks.scores import ScoreStore
from pat.questions.hub import LETTERS, Row, make_row

MAX_POSITIONS = 700

SAME = 1e-4
"""Float32 sums of a few log-probabilities, in another order."""


def questions(seed: int, num_choices: int, count: int = 12) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def word(length: int) -> str:
        return "".join(chr(97 + int(torch.randint(26, (), generator=generator))) for _ in range(length))

    return [
        make_row(
            f"Question: {word(3 + i)} {word(4)}?", [word(1 + (i + j) % 6) for j in range(num_choices)], i % num_choices
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A random Llama that says capital letters often enough."""
    model = build("llama", tied=False, max_position_embeddings=MAX_POSITIONS)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        for letter in "ABCD":
            model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(letter)] *= 2
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for seed, (name, num_choices) in enumerate({"copa": 2, "siqa": 3, "arc_easy": 4}.items()):
        rows = questions(seed, num_choices)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(model: nn.Module, data: Path, **options: Any) -> TaskEvaluation:
    settings = {"tasks": "siqa,arc_easy", "data_dir": data, "batch_size": 5, "progress": False}
    return evaluate_tasks(model, tiny_tokenizer(), **(settings | options))


def samples_of(folder: Path, task: str, protocol: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / f"{task}.{protocol}.jsonl").read_text().splitlines()]


def test_every_answer_is_the_plain_one(model: nn.Module, data: Path, tmp_path: Path) -> None:
    evaluation = run(model, data, log_samples=True, output_dir=tmp_path)
    tokenizer = tiny_tokenizer()
    decided = 0
    for task in ("siqa", "arc_easy"):
        rows = [json.loads(line) for line in (data / f"{task}.jsonl").read_text().splitlines()]
        letters, likelihoods = (samples_of(tmp_path, task, protocol) for protocol in ("letter", "likelihood"))
        right: dict[str, list[float]] = {"letter": [], "acc": [], "acc_norm": []}
        for row, letter, likelihood in zip(rows, letters, likelihoods, strict=True):
            answer = plain_letter(model, tokenizer, row, MAX_POSITIONS)
            assert (letter["prediction"], letter["text"]) == (answer.letter, answer.text)
            decided += answer.letter is not None and len(answer.text) < 5
            values = plain_likelihoods(model, tokenizer, row, MAX_POSITIONS)
            assert likelihood["log_likelihoods"] == pytest.approx(values, abs=SAME)
            per_character = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
            assert likelihood["prediction"] == LETTERS[best(values)[0]]
            assert letter["answer"] == likelihood["answer"] == LETTERS[row["answer"]]
            right["letter"].append(float(answer.letter == LETTERS[row["answer"]]))
            right["acc"].append(float(best(values)[0] == row["answer"]))
            right["acc_norm"].append(float(best(per_character)[0] == row["answer"]))
            assert letter["correct"] == bool(right["letter"][-1])
            assert likelihood["correct"] == bool(right["acc"][-1])
            assert likelihood["correct_norm"] == bool(right["acc_norm"][-1])
        by_letter, by_likelihood = (evaluation.get(task, protocol) for protocol in ("letter", "likelihood"))
        assert by_letter is not None and by_likelihood is not None
        assert (by_letter.acc, by_letter.acc_norm) == (pytest.approx(sum(right["letter"]) / 12), None)
        assert by_likelihood.acc == pytest.approx(sum(right["acc"]) / 12)
        assert by_likelihood.acc_norm == pytest.approx(sum(right["acc_norm"]) / 12)
        assert by_likelihood.acc_stderr == pytest.approx(stdev(right["acc"]) / math.sqrt(12))
        assert by_letter.num_questions == 12
        assert by_letter.num_without_letter == sum(letter["prediction"] is None for letter in letters)
        assert by_likelihood.num_without_letter is None
    assert decided > 5  # answers that ended early: otherwise the test shows nothing of it


def test_the_mean_weighs_tasks_not_questions() -> None:
    scores = [
        TaskScore(name, "letter", n, acc, 0.1, None, None, 1.0) for name, n, acc in (("a", 1, 1.0), ("b", 9, 0.0))
    ]
    evaluation = TaskEvaluation(tuple(scores), None)
    assert evaluation.mean_stderr("letter") == pytest.approx(math.sqrt(0.1**2 + 0.1**2) / 2)
    assert evaluation.mean_stderr("letter", "acc_norm") is None and evaluation.mean_stderr("likelihood") is None
    assert evaluation.mean("letter") == 0.5
    assert evaluation.mean("letter", "acc_norm") is None and evaluation.mean("likelihood") is None
    written = evaluation.to_dict()
    assert written["mean"] == {"letter": {"acc": 0.5, "acc_norm": None}}
    assert written["scores"][0]["task"] == "a"


def test_a_limit_takes_evenly_spaced_questions(model: nn.Module, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ["copa"], "protocols": "likelihood", "log_samples": True}
    evaluation = run(model, data, limit=3, output_dir=tmp_path / "a", **options)
    assert (evaluation.limit, evaluation.scores[0].num_questions) == (3, 3)
    run(model, data, output_dir=tmp_path / "b", **options)
    some, every = (samples_of(tmp_path / name, "copa", "likelihood") for name in "ab")
    assert [sample["prompt"] for sample in some] == [every[index]["prompt"] for index in (0, 4, 8)]
    assert run(model, data, limit=1, **(options | {"log_samples": False})).scores[0].acc_stderr is None


def test_started_again_nothing_finished_is_repeated(
    model: nn.Module, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    original = harness._measure

    def measure(*args: Any, **options: Any) -> Any:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((args[2].name, args[3]))
        return original(*args, **options)

    monkeypatch.setattr(harness, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, output_dir=tmp_path)
    first, measured[:] = list(measured), []
    resumed = run(model, data, output_dir=tmp_path)
    assert first == [("siqa", "letter"), ("siqa", "likelihood"), ("arc_easy", "letter")]
    assert measured == [("arc_easy", "likelihood")]
    monkeypatch.setattr(harness, "_measure", lambda *_, **__: pytest.fail("measured again"))
    assert run(model, data, output_dir=tmp_path) == resumed
    assert run(model, data, output_dir=tmp_path, tasks="siqa", protocols="letter").scores == resumed.scores[:1]


def test_answers_that_were_not_kept_are_asked_for_again(model: nn.Module, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": "copa", "protocols": "letter", "output_dir": tmp_path}
    run(model, data, **options)
    assert not (tmp_path / "samples").exists()
    run(model, data, log_samples=True, **options)
    assert len(samples_of(tmp_path, "copa", "letter")) == 12


def test_a_folder_with_scores_of_something_else_is_refused(model: nn.Module, data: Path, tmp_path: Path) -> None:
    run(model, data, tasks="copa", protocols="letter", output_dir=tmp_path)
    with pytest.raises(PatError, match=r"other questions \(--limit, --data_dir\); choose another --output_dir"):
        run(model, data, tasks="copa", limit=5, output_dir=tmp_path)
    with pytest.raises(PatError, match="other model"):
        run(build("llama", tied=True, max_position_embeddings=700), data, tasks="copa", output_dir=tmp_path)
    (tmp_path / "scores" / "copa.letter.json").write_text("{}")
    with pytest.raises(PatError, match="is not a finished score"):
        run(model, data, tasks="copa", output_dir=tmp_path)


def test_scores_of_another_wording_or_harness_are_refused(
    model: nn.Module, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, data, tasks="copa", protocols="letter", output_dir=tmp_path)
    monkeypatch.setattr(harness, "fingerprint_wording", lambda: {"letter": "another"})
    with pytest.raises(PatError, match="other wording;"):
        run(model, data, tasks="copa", protocols="letter", output_dir=tmp_path)


def test_two_writers_do_not_share_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []
    monkeypatch.setattr("os.replace", lambda source, target: replaced.append(Path(source).name))
    for process in (7, 8):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        ScoreStore(tmp_path, {}).write(TaskScore("copa", "letter", 1, 1.0, None, None, None, 1.0), [], None)
    assert len(set(replaced)) == 2


def test_every_modules_mode_is_as_before(data: Path) -> None:
    model = build("llama", tied=True, max_position_embeddings=MAX_POSITIONS)
    model.train()
    model.lm_head.eval()
    run(model, data, tasks="copa", protocols="likelihood", limit=2)
    assert model.training and not model.lm_head.training


def test_the_table_shows_percent_and_means(model: nn.Module, data: Path) -> None:
    from rich.console import Console

    evaluation = run(model, data)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(score_table(evaluation))
    text = console.export_text()
    likelihood = evaluation.get("siqa", "likelihood")
    assert likelihood is not None and likelihood.acc_norm is not None and likelihood.acc_norm_stderr is not None
    assert f"{100 * likelihood.acc_norm:.2f} ± {100 * likelihood.acc_norm_stderr:.2f}" in text
    mean = evaluation.mean("likelihood")
    error = evaluation.mean_stderr("likelihood")
    assert mean is not None and error is not None and f"{100 * mean:.2f} ± {100 * error:.2f}" in text
    assert all(word in text for word in ("SIQA", "ARC-E", "mean", "per character", "letter", "no letter"))
    letter = evaluation.get("siqa", "letter")
    assert letter is not None and letter.num_without_letter is not None
    (line,) = (line for line in text.splitlines() if "SIQA" in line)
    assert line.split("│")[-2].strip() == f"{100 * letter.num_without_letter / letter.num_questions:.1f}"
    likelihoods = replace(evaluation, scores=tuple(s for s in evaluation.scores if s.protocol == "likelihood"))
    assert all(column.header != "no letter" for column in score_table(likelihoods).columns)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": "arc"}, ["'arc'", "arc_challenge, arc_easy"]),
        ({"protocols": "words"}, ["'words'", "letter, likelihood"]),
        ({"limit": 0}, ["limit=0"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"data_dir": "/nowhere"}, ["/nowhere", "no such folder"]),
        ({"tasks": "boolq"}, ["boolq.jsonl", "no such file"]),
        ({"log_samples": True}, ["output_dir"]),
    ],
)
def test_wrong_input_is_one_line(model: nn.Module, data: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PatError) as error:
        run(model, data, **options)
    assert all(word in str(error.value) for word in words)


def test_without_the_harness_the_extra_is_named(model: nn.Module, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PatError, match=r"pip install 'pat-llm\[evaluation\]'"):
        run(model, data)
