"""The demo's data set and prompts are sound, and what cannot be done is refused before the download."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pat import cli
from pat.demo import command
from pat.demo.data import SAMPLE_PROMPTS, demo_data_path


def records() -> list[dict[str, str]]:
    return [json.loads(line) for line in demo_data_path().read_text(encoding="utf-8").splitlines()]


def words(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_instructions_are_short_unique_and_not_the_sample_prompts() -> None:
    for record in records():
        assert list(record) == ["instruction", "input", "output"]
        assert all(isinstance(text, str) and text == text.strip() for text in record.values())
        assert 1 <= len(record["output"].split()) <= 60, record
        assert 1 <= len(record["instruction"].split()) <= 30, record
        assert len(record["input"].split()) <= 60, record
    instructions = [words(text) for text in (*(record["instruction"] for record in records()), *SAMPLE_PROMPTS)]
    assert len(set(instructions)) == len(instructions) >= 246


def test_the_readme_states_the_number_of_records() -> None:
    readme = demo_data_path().with_name("README.md").read_text(encoding="utf-8")
    with_input = sum(bool(record["input"]) for record in records())
    assert f"{len(records())} English instructions" in readme
    assert re.search(rf"\b{with_input} of them come with a", readme)
    assert "Apache-2.0" in readme


@pytest.mark.parametrize(
    "flags",
    [
        {"pruning_ratio": 5},
        {"max_steps": 0},
        {"dataset_name": "/nowhere/rows.jsonl"},
        {"output_dir": Path(__file__).parent},
    ],
)
def test_what_cannot_be_done_is_refused_before_the_download(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "prepare_smollm2", lambda *_, **__: pytest.fail("it was downloaded"))
    given = {"output_dir": tmp_path / "out"} | flags
    assert cli.main(["demo", *(f"--{name}={value}" for name, value in given.items())]) == 2
    assert str(next(iter(flags.values()))) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
