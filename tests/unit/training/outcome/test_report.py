"""`pat report`: what it refuses, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pat.cli import main
from pat.training.outcome.report import changed_options
from pat.training.run.run_file import RunFile

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


def test_no_file_but_a_report_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RECORD), encoding="utf-8")
    page = tmp_path / "page.html"
    command = ["report", "--run", str(tmp_path), "--output", str(page)]
    page.write_text("<title>my own: a page</title>", encoding="utf-8")
    assert main(command) == 2 and page.read_text(encoding="utf-8") == "<title>my own: a page</title>"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "page.html, which exists and is no report of a run; give another name" in line
    for harmless in ("", "<title>base: report of pat tune</title>"):  # that of an earlier version
        page.write_text(harmless, encoding="utf-8")
        assert main(command) == 0
    assert main(command) == 0
    text = page.read_text(encoding="utf-8").replace("report of pat tune", "")  # of a later one with another title
    page.write_text(text, encoding="utf-8")
    assert main(command) == 0


def test_a_run_whose_folder_is_misspelt_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run-a").mkdir()
    assert main(["report", "--run", str(tmp_path / "rum-a")]) == 2
    assert f"no such folder (did you mean {tmp_path / 'run-a'}?)" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "shown"), [(0.25, []), (None, []), (0.3, [("0.25", "0.3")])])
def test_whoever_gives_the_ratio_that_is_the_default_has_changed_nothing(
    given: float | None, shown: list[tuple[str, str]], tmp_path: Path
) -> None:
    RunFile({"pruning_ratio": given}, base="", data="").write(tmp_path)
    as_text = {"deepspeed": "None"}  # as the trainer's arguments are recorded
    changed = changed_options(tmp_path, RECORD | {"training_arguments": as_text})
    assert changed is not None
    assert [(row.default, row.value) for row in changed if row.name == "pruning_ratio"] == shown
