"""What `pat evaluate` refuses before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from pat.errors import PatError
from pat.evaluation.options import EvaluateOptions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--text_file", "--dataset_name", "--tasks"]),
        ({"tasks": ["copa,arc"]}, ["'arc'", "arc_easy"]),
        ({"tasks": ["copa"], "protocol": ["words"]}, ["words", "letter or likelihood"]),
        ({"tasks": ["copa"], "protocol": []}, ["none", "letter or likelihood"]),
        ({"tasks": ["copa"], "log_samples": True}, ["--output_dir"]),
        ({"tasks": ["copa"], "output_dir": Path(__file__)}, ["which is a file"]),
        ({"text_file": Path("a"), "output_dir": Path("out")}, ["--tasks"]),
        ({"text_file": Path("a"), "protocol": ["letter"]}, ["--protocol", "--tasks"]),
        ({"text_file": Path("a"), "template": "alpaca"}, ["--template", "--dataset_name"]),
        ({"text_file": Path("a"), "max_length": 0}, ["max_length=0"]),
        ({"text_file": Path("a"), "limit": -1}, ["limit=-1"]),
        ({"text_file": Path("a"), "batch_size": 0}, ["batch_size=0"]),
        ({"text_file": Path("a"), "output": Path(".")}, ["folder", "JSON"]),
        ({"text_file": Path("a"), "output": Path(__file__) / "figures.json"}, ["cannot be written"]),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PatError) as error:
        EvaluateOptions("model", **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"command": "evaluate"}')
    (tmp_path / "empty").touch()
    for file in (tmp_path / "old.json", tmp_path / "empty", tmp_path / "new/figures.json", Path("/dev/null")):
        EvaluateOptions("model", text_file=Path("a"), output=file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.json"]
    assert (tmp_path / "old.json").read_text() == '{"command": "evaluate"}'


@pytest.mark.parametrize("content", ['{"command": "merge"}', '{"hidden_size": 48}', "[]", "text"])
def test_the_figures_replace_nothing_but_figures(content: str, tmp_path: Path) -> None:
    """Least of all files that nobody named, such as those of the base that an adapter is evaluated on."""
    file = tmp_path / "config.json"
    file.write_text(content)
    (tmp_path / "link").symlink_to(file)
    for name in ("config.json", "link"):
        with pytest.raises(PatError, match=f"{name}, which exists and is not what an evaluation has written"):
            EvaluateOptions("model", text_file=Path("a"), output=tmp_path / name)
    assert file.read_text() == content


def test_a_folder_goes_on_with_the_evaluation_it_holds_and_no_other(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ["copa"], "output_dir": tmp_path}
    EvaluateOptions("model", **options)
    (tmp_path / "answers-0123456789abcdef.db").write_text("")  # what an interrupted one leaves
    EvaluateOptions("model", **options)
    results = tmp_path / "results.json"
    digest = EvaluateOptions("model", **options).model_digest
    results.write_text(json.dumps({"command": "evaluate", "model": "model", "model_digest": digest}))
    EvaluateOptions("model", **options)
    with pytest.raises(PatError, match=r"holds the evaluation of another model \(model\), not of other/model"):
        EvaluateOptions("other/model", **options)
    for content in ('{"command": "tune", "model": "model"}', "[]", "not JSON"):
        results.write_text(content)
        with pytest.raises(PatError, match="holds files, but no evaluation"):
            EvaluateOptions("model", **options)
        assert results.read_text() == content
