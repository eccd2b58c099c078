"""Tasks as training data."""

import json
from pathlib import Path

import pytest

from pat import PatError
from pat.data.conversion import Reading
from pat.data.load import load_training_data
from pat.data.sources import load_source
from pat.evaluation.tasks.utils import letter_prompt
from pat.questions import make_row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps(make_row("Question: asked?", ["a", "b", "c", "d"], 0)))
    for task, answer in (("arc_easy", 2), ("wsc", 1)):
        choices = ["Yes", "No"] if task == "wsc" else ["a", "b", "c", "d"]
        rows = [make_row(f"Question: {task} {number}?", choices, answer) for number in range(6)]
        (tmp_path / f"{task}.train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def test_prompts_are_those_of_the_evaluation_and_answers_are_letters(folder: Path) -> None:
    data = load_training_data(f"task:{folder}/arc_easy,wsc", held_out=0)
    assert data.source.template == "alpaca" and data.num_rows == 12
    first = json.loads((folder / "arc_easy.train.jsonl").read_text().splitlines()[0])
    assert data.train[0] == {"prompt": letter_prompt(first), "completion": "C"}
    assert set(data.train["completion"]) == {"C", "B"}
    assert not any("Question: asked?" in prompt for prompt in data.train["prompt"])  # what is evaluated is not here


@pytest.mark.parametrize("split", ["train[:3]", "validation", "test"])
def test_files_have_one_split(folder: Path, split: str) -> None:
    with pytest.raises(PatError, match=r"expected 'train', which is <task>\.train\.jsonl"):
        load_training_data(f"task:{folder}/arc_easy", split=split, held_out=0)


def test_a_chat_template_is_refused(folder: Path) -> None:
    with pytest.raises(PatError, match=r"template='chat' with task:.*expected 'alpaca' or 'auto'"):
        load_source(f"task:{folder}/arc_easy", Reading("chat", "a template"))


def test_some_are_held_out(folder: Path) -> None:
    data = load_training_data(f"task:{folder}/arc_easy,wsc", held_out=4)
    assert data.held_out is not None and len(data.held_out) == 4 and len(data.train) == 8


def test_other_questions_have_another_fingerprint(folder: Path) -> None:
    names = (f"task:{folder}/arc_easy", f"task:{folder}/wsc")
    assert len({load_training_data(name, held_out=0).source.fingerprint for name in names}) == 2


@pytest.mark.parametrize(("name", "message"), [("nope", "unknown task"), ("piqa", r"piqa\.train\.jsonl: no such file")])
def test_what_is_not_there_is_named(folder: Path, name: str, message: str) -> None:
    with pytest.raises(PatError, match=message):
        load_training_data(f"task:{folder}/{name}")
