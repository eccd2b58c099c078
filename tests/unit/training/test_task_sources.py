"""Tasks as training data."""

import json
from pathlib import Path

import pytest

from pat import PatError
from pat.evaluation.tasks.protocols import letter_prompt
from pat.questions.hub import make_row
from pat.training.data import load_training_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for task, answer in (("arc_easy", 2), ("wsc", 1)):
        choices = ["Yes", "No"] if task == "wsc" else ["a", "b", "c", "d"]
        rows = [make_row(f"Question: {task} {number}?", choices, answer) for number in range(6)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def test_prompts_are_those_of_the_evaluation_and_answers_are_letters(folder: Path) -> None:
    data = load_training_data(f"task:{folder}/arc_easy,wsc", held_out=0)
    assert data.template == "alpaca" and data.num_rows == 12
    first = json.loads((folder / "arc_easy.jsonl").read_text().splitlines()[0])
    assert data.train[0] == {"prompt": letter_prompt(first), "completion": "C"}
    assert set(data.train["completion"]) == {"C", "B"}


def test_some_are_held_out(folder: Path) -> None:
    data = load_training_data(f"task:{folder}/arc_easy,wsc", held_out=4)
    assert data.held_out is not None and len(data.held_out) == 4 and len(data.train) == 8


def test_other_questions_have_another_fingerprint(folder: Path) -> None:
    names = (f"task:{folder}/arc_easy", f"task:{folder}/wsc")
    assert len({load_training_data(name, held_out=0).fingerprint for name in names}) == 2


@pytest.mark.parametrize(("name", "message"), [("nope", "unknown task"), ("piqa", "piqa.jsonl: no such file")])
def test_what_is_not_there_is_named(folder: Path, name: str, message: str) -> None:
    with pytest.raises(PatError, match=message):
        load_training_data(f"task:{folder}/{name}")
