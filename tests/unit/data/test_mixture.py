"""Several datasets in one run: each has its share, whole rows are held out of each, and what is wrong is said."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from pat.data.mixture import apportioned, drawn, quotas
from pat.errors import PatError
from pat.training.arguments import build_arguments
from pat.training.inputs.prepare import Prepared, prepare
from pat.training.run.run_file import RunFile


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    long = [{"instruction": f"ask {i}", "output": f"answer {i}"} for i in range(60)]
    short = [{"text": f"cat {i}", "more": 1} for i in range(10)]
    return [write(tmp_path / "long.jsonl", long), write(tmp_path / "short.jsonl", short)]


def prepared(base: Path, files: list[Path], **flags: Any) -> Prepared:
    given = {"output_dir": str(files[0].parent / "out"), "use_cpu": True, "bf16": False, "max_length": 256} | flags
    arguments = build_arguments(
        model_name_or_path=str(base), dataset_name=[str(file) for file in files], report_to="none", **given
    )
    return prepare(arguments, AutoConfig.from_pretrained(base))


def texts(base: Path, rows: Any) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    decoded = (tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows)
    return [text.strip().splitlines()[-1] for text in decoded]


def test_each_source_has_its_share_and_its_rows_come_equally_often(stories260k_path: Path, files: list[Path]) -> None:
    data = prepared(stories260k_path, files, dataset_weights=[3, 2], held_out="10")
    assert [source.num_held_out for source in data.record.sources] == [6, 4]
    found = Counter(texts(stories260k_path, data.train))
    cats = {text: times for text, times in found.items() if text.startswith("cat")}
    assert (found.total(), sum(cats.values())) == (90, 36)  # 54 answers are three fifths
    assert set(cats.values()) == {6} and len(cats) == 6
    assert not set(found) & set(texts(stories260k_path, data.held_out))
    assert [(source.share, source.times) for source in data.record.sources] == [(0.6, 1.0), (0.4, 6.0)]
    assert data.num_tokens == sum(map(len, data.train["input_ids"]))
    assert data.held_out_groups == [0] * 6 + [1] * 4
    assert data.record.unused_columns == ("more",)
    again = prepared(stories260k_path, files, dataset_weights=[30, 20], held_out="10")
    assert again.train.to_list() == data.train.to_list()
    kinds = [text.startswith("cat") for text in texts(stories260k_path, data.train)]
    assert sum(a != b for a, b in pairwise(kinds)) > 10  # they come mixed


def test_without_weights_every_row_comes_once(stories260k_path: Path, files: list[Path]) -> None:
    data = prepared(stories260k_path, files)
    assert len(data.train) == len(set(texts(stories260k_path, data.train))) == 70 - 7


def test_a_held_out_file_is_of_none_of_the_sources(stories260k_path: Path, files: list[Path], tmp_path: Path) -> None:
    apart = write(tmp_path / "apart.jsonl", [{"instruction": "ask", "output": "answer"}] * 7)
    data = prepared(stories260k_path, files, held_out=str(apart))
    assert data.record.num_held_out == len(data.held_out) == 7 and not data.held_out_groups
    assert [source.num_held_out for source in data.record.sources] == [0, 0]


def test_a_part_of_a_pass_is_of_different_examples() -> None:
    times = Counter(drawn(10, 27, np.random.default_rng(0)).tolist())
    assert sorted(times.values()) == [2] * 3 + [3] * 7
    assert quotas(["a", "b"], [100, 10], [0.5, 0.5]) == [100, 100]
    assert quotas(["a", "b"], [100, 10], [10, 0.1]) == [1000, 10]
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3]
    with pytest.raises(PatError, match="an epoch has 100,000,000 examples, of 200,000"):
        quotas(["a", "b"], [100_000, 100_000], [1, 999])


def test_a_run_knows_all_its_sources_and_their_shares(stories260k_path: Path, files: list[Path]) -> None:
    def run(**flags: Any) -> RunFile:
        names = [str(file) for file in files]
        given = {"output_dir": "out", "use_cpu": True, "bf16": False, "dataset_name": names} | flags
        arguments = build_arguments(model_name_or_path=str(stories260k_path), **given)
        return RunFile.of(arguments, AutoConfig.from_pretrained(stories260k_path), "data")

    own = run(dataset_weights=[3, 1])
    own.check(run(dataset_weights=[0.75, 0.25]), files[0].parent)
    with pytest.raises(PatError, match=r"dataset_weights: \[0.75, 0.25\] in the run, \[0.5, 0.5\] given"):
        own.check(run(dataset_weights=[1, 1]), files[0].parent)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dataset_weights": [1]}, "Got 1 dataset_weights for 2 dataset_name"),
        ({"dataset_weights": [1, 0]}, "Got dataset_weights=0; expected"),
        ({"dataset_weights": [1, float("nan")]}, "Got dataset_weights=nan; expected"),
        ({"dataset_weights": [1e6, 1e-6]}, "comes .* times in an epoch; expected at most 1,000"),
        ({"dataset_weights": [1, 1], "held_out": "-3"}, "Got held_out=-3"),
        ({"names": ["long.jsonl", "../{folder}/long.jsonl"]}, "twice; give it once"),
        ({"names": ["long.jsonl", "none.jsonl"]}, "none.jsonl: no such file"),
        ({"names": ["long.jsonl", "short.jsonl"], "max_length": 4}, "long.jsonl: All .* truncated away"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: dict[str, Any], words: str, stories260k_path: Path, files: list[Path], tmp_path: Path
) -> None:
    flags = {"names": ["long.jsonl", "short.jsonl"], **flags}
    names = flags.pop("names")
    with pytest.raises(PatError, match=words):
        prepared(stories260k_path, [tmp_path / name.format(folder=tmp_path.name) for name in names], **flags)
    assert not (tmp_path / "out").exists()
