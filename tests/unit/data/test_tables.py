"""Data that is too large for memory: the same rows, tokens and records, from tables that are made once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from transformers import AutoConfig, AutoTokenizer

from pat.data import conversion, sources, tables, tokens
from pat.data.load import load_training_data
from pat.errors import PatError
from pat.training.arguments import build_arguments
from pat.training.inputs.prepare import Prepared, prepare


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "cache_folder", lambda: tmp_path / "cache")


def rows(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"ask {i}", "output": "" if i % 7 == 3 else f"answer {i}"} for i in range(count)]


def write(path: Path, given: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return path


def prepared(base: Path, file: Path, **flags: Any) -> Prepared:
    given = {"output_dir": str(file.parent / "out"), "use_cpu": True, "bf16": False, "max_length": 128} | flags
    arguments = build_arguments(model_name_or_path=str(base), dataset_name=str(file), report_to="none", **given)
    return prepare(arguments, AutoConfig.from_pretrained(base))


def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_large_data_comes_to_what_small_data_comes_to(
    num_proc: int | None, stories260k_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "data.jsonl", rows(1300))
    small = prepared(stories260k_path, file)
    large(monkeypatch)
    for _ in range(2):  # made, and found again
        again = prepared(stories260k_path, file, dataset_num_proc=num_proc)
        assert tables.is_on_disk(again.train)
        assert again.train.to_list() == small.train.to_list()
        assert (again.record, again.held_out) == (small.record, small.held_out)
        assert again.num_tokens == sum(map(len, small.train["input_ids"]))
        monkeypatch.setattr(tokens.Encoder, "__call__", refuse_many(tokens.Encoder.__call__))


def refuse_many(encode: Any) -> Any:
    def call(self: Any, batch: Any) -> Any:
        assert len(batch["prompt"]) < 100, "the held-out rows alone are tokenised again"
        return encode(self, batch)

    return call


@pytest.mark.parametrize("spoil", ["torn", "no facts", "other content"])
def test_a_table_that_is_not_whole_or_not_of_this_file_is_made_anew(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(monkeypatch)
    file = write(tmp_path / "data.jsonl", rows(20))
    before = load_training_data(file, held_out=0).train.to_list()
    [folder] = (tmp_path / "cache").iterdir()
    expected = before
    if spoil == "torn":
        os.truncate(folder / "rows.arrow", 100)
    elif spoil == "no facts":
        (folder / "facts.json").write_text("{")
    else:
        file.write_text(file.read_text().replace("answer", "Answer"), encoding="utf-8")
        expected = [row | {"completion": row["completion"].replace("answer", "Answer")} for row in before]
    assert load_training_data(file, held_out=0).train.to_list() == expected


def test_what_is_wrong_with_a_row_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large(monkeypatch)
    file = write(tmp_path / "data.jsonl", [*rows(2000), {"instruction": 1}])
    with pytest.raises(PatError, match=r"data\.jsonl, line 2001: field 'output' is missing"):
        load_training_data(file)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_late_column_makes_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "ROWS_LOOKED_AT", 2)
    late = [{"question": f"q{i}", "answer": "a"} for i in range(4)] + [{"question": "q", "answer": "a", "context": "c"}]
    for is_large in (False, True):
        if is_large:
            large(monkeypatch)
        data = load_training_data(write(tmp_path / "data.jsonl", late), held_out=0)
        assert data.source.format.input == "context" and len(data.train) == 5
        assert "### Input:\nc\n" in data.train[4]["prompt"]


def test_the_cache_is_bounded_and_what_is_used_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CACHE_BYTES", 3000)

    def make(folder: Path) -> dict[str, Any]:
        tables.write_table(folder / "rows.arrow", Features({"a": Value("string")}), [{"a": "x" * 1000}])
        return {}

    for number, key in enumerate(("first", "second", "first", "third")):
        tables.cached_table(key, make)
        os.utime(tmp_path / "cache" / key / "facts.json", (number, number))
        if key != "second":
            tables._held.clear()  # as if the process had ended
    found, _ = tables.cached_table("fourth", make)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"fourth", "third"}
    assert isinstance(found, Dataset) and found[0] == {"a": "x" * 1000}


@pytest.mark.parametrize("is_torn", [False, True])
def test_of_two_that_make_the_same_table_the_faster_ones_stays(tmp_path: Path, is_torn: bool) -> None:
    def make(folder: Path) -> dict[str, Any]:
        tables.write_table(folder / "rows.arrow", Features({"a": Value("string")}), [{"a": "x"}])
        return {"by": "the faster one"}

    def make_slowly(folder: Path) -> dict[str, Any]:
        tables.cached_table("same", make)
        files.update(file.stat().st_ino for file in (tmp_path / "cache" / "same").iterdir())
        return make(folder) | {"by": "the slower one"}

    files = set[int]()
    if is_torn:
        (tmp_path / "cache" / "same").mkdir(parents=True)
        (tmp_path / "cache" / "same" / "rows.arrow").touch()
    found, facts = tables.cached_table("same", make_slowly)
    assert facts == {"by": "the faster one"} and found[0] == {"a": "x"}
    assert files == {file.stat().st_ino for file in (tmp_path / "cache" / "same").iterdir()}, "they are in use"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["same"]


def test_a_table_that_is_open_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CACHE_BYTES", 0)
    monkeypatch.setattr(tables, "_held", {})

    def make(folder: Path) -> dict[str, Any]:
        tables.write_table(folder / "rows.arrow", Features({"a": Value("string")}), [{"a": "x"}])
        return {}

    tables.cached_table("first", make)
    elsewhere = tables._held.pop(tmp_path / "cache" / "first")  # the lock of another process is no other
    tables.cached_table("second", make)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"first", "second"}
    elsewhere.close()
    tables.cached_table("third", make)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"second", "third"}


def test_another_special_token_makes_other_tokens(stories260k_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories260k_path)
    before = tokens.Encoder(tokenizer, tokens.Truncation()).parts()
    assert tokens.Encoder(tokenizer, tokens.Truncation()).parts() == before
    tokenizer.pad_token = "<s>"
    assert tokens.Encoder(tokenizer, tokens.Truncation()).parts() != before
