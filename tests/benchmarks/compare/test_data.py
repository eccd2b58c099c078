"""How the rows of a comparison are split."""

import json
from pathlib import Path
from typing import Any

import pytest
from compare.config import CompareConfig
from compare.data import prepare_data
from tiny_models import tiny_tokenizer

from pat.errors import PatError

NUM_ROWS = 300


def make(tmp_path: Path, **overrides: Any) -> CompareConfig:
    """A file that is sorted by source, as files of several sources are."""
    source = tmp_path / "rows.jsonl"
    if not source.exists():
        rows = [{"prompt": f"say {i} ", "completion": "yes" if i < NUM_ROWS // 2 else "no"} for i in range(NUM_ROWS)]
        source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings: dict[str, Any] = {
        "models": ["base"],
        "data": str(source),
        "methods": ["lora"],
        "output_dir": tmp_path / "out",
        "steps": 3,
        "held_out": 60,
        "validation": 60,
        "max_length": 64,
        "template": "auto",
    }
    return CompareConfig(**settings | overrides)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_validation_and_report_have_some_of_each_source(tmp_path: Path) -> None:
    files = prepare_data(make(tmp_path), tiny_tokenizer(), tmp_path / "data")
    parts = [read(path) for path in (files.train, files.validation, files.held_out)]
    assert [len(part) for part in parts] == [NUM_ROWS - 120, 60, 60]
    prompts = [row["prompt"] for part in parts for row in part]
    assert len(set(prompts)) == NUM_ROWS  # no row in two parts
    for part in parts[1:]:
        share = sum(row["completion"] == "yes" for row in part) / len(part)
        assert 0.25 < share < 0.75


def test_rows_other_than_expected_are_refused_and_those_there_stay(tmp_path: Path) -> None:
    config = make(tmp_path)
    files = prepare_data(config, tiny_tokenizer(), tmp_path / "data")
    digest, before = files.digest(), files.train.read_bytes()
    assert prepare_data(config, tiny_tokenizer(), tmp_path / "data", expected=digest).digest() == digest
    source = Path(config.data)
    source.write_text(source.read_text(encoding="utf-8").replace("say 7 ", "say so "), encoding="utf-8")
    with pytest.raises(PatError, match="gives other rows"):
        prepare_data(config, tiny_tokenizer(), tmp_path / "data", expected=digest)
    assert files.train.read_bytes() == before
    assert prepare_data(config, tiny_tokenizer(), tmp_path / "data").digest() != digest


def test_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    files = prepare_data(make(tmp_path), tiny_tokenizer(), tmp_path / "data")
    digest = files.digest()
    (tmp_path / "data" / "source.json").write_text("{", encoding="utf-8")
    assert prepare_data(make(tmp_path), tiny_tokenizer(), tmp_path / "data").digest() == digest


def test_rows_that_are_cut_off_are_said_and_if_all_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"say {i} " * (1 if i % 2 else 40), "completion": "it is"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prepare_data(make(tmp_path, held_out=20, validation=10), tiny_tokenizer(), tmp_path / "data")
    assert "have no response left within --max_length 64" in caplog.text and "of 20 to report on" in caplog.text
    with pytest.raises(PatError, match="leaves no response"):
        prepare_data(make(tmp_path, held_out=20, validation=10, max_length=2), tiny_tokenizer(), tmp_path / "data")


def test_data_of_other_settings_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    files = prepare_data(make(tmp_path), tiny_tokenizer(), tmp_path / "data")
    written = files.train.stat().st_mtime_ns
    assert prepare_data(make(tmp_path), tiny_tokenizer(), tmp_path / "data").train.stat().st_mtime_ns == written
    prepare_data(make(tmp_path, rows=7), tiny_tokenizer(), tmp_path / "data")
    assert len(files.train.read_text(encoding="utf-8").splitlines()) == 7
