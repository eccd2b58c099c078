"""`pat report`: what it refuses, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pat.cli import main
from pat.training.report import changed_options
from pat.training.run_file import RunFile

RECORD = {"command": "tune", "recipe": "default", "model_name_or_path": "half a pair \ud800"}


def test_a_record_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RECORD), encoding="utf-8")
    (tmp_path / "report.html").write_text("an older one", encoding="utf-8")
    assert main(["report", "--run", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "half a pair ?" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (None, [], "no results.json"),
        ("{", [], "not readable"),
        ("[1]", [], "no record of a command"),
        ('{"command": "merge"}', [], "the record of `pat merge`"),
        (json.dumps(RECORD), ["--output", "page.pdf"], "an .html file"),
        (json.dumps(RECORD), ["--output", "nowhere/page.html"], "an .html file"),
    ],
)
def test_what_cannot_be_reported_on_is_one_line(
    content: str | None, more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content, encoding="utf-8")
    assert main(["report", "--run", str(tmp_path), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("given", "shown"), [(0.25, []), (None, []), (0.3, [("0.25", "0.3")])])
def test_whoever_gives_the_ratio_that_is_the_default_has_changed_nothing(
    given: float | None, shown: list[tuple[str, str]], tmp_path: Path
) -> None:
    RunFile({"pruning_ratio": given}, base="", data="").write(tmp_path)
    as_text = {"deepspeed": "None"}  # as the trainer's arguments are recorded
    changed = changed_options(tmp_path, RECORD | {"training_arguments": as_text})
    assert changed is not None
    assert [(row.default, row.value) for row in changed if row.name == "pruning_ratio"] == shown
