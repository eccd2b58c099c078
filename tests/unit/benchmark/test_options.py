"""What `pat benchmark` refuses, in one line and before anything is loaded or written."""

from pathlib import Path
from typing import Any

import pytest

from pat.benchmark.options import BenchmarkOptions
from pat.errors import PatError
from pat.loading.weights import resolve_device
from pat.options import OptionsParser

MODELS = {"model": "m", "baseline": "b"}


@pytest.mark.parametrize("words", [["16,1,8"], ["16", "1", "8", "8"]])
def test_lists_are_read_in_any_form_and_sorted(words: list[str]) -> None:
    parser = OptionsParser("pat benchmark", BenchmarkOptions)
    assert parser.parse(["--model=m", "--baseline=b", "--batch_sizes", *words]).batch_sizes == [1, 8, 16]


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"contexts": []}, "contexts="),
        ({"batch_sizes": [0]}, "batch_sizes="),
        ({"repetitions": 0}, "repetitions=0; expected a whole number that is at least 1"),
        ({"warmup": -1}, "warmup=-1; expected a whole number that is at least 0"),
        ({"new_tokens": -1}, "new_tokens"),
        ({"threads": 0}, "threads=0"),
        ({"max_seconds": 0.0}, "max_seconds=0.0"),
        ({"dtype": "int8"}, "dtype='int8'; expected one of float32"),
    ],
)
def test_what_makes_no_sense_is_refused(field: dict[str, Any], words: str) -> None:
    with pytest.raises(PatError, match=words):
        BenchmarkOptions(**MODELS | field)


@pytest.mark.parametrize(
    ("name", "words"), [("abacus", "device='abacus'; expected auto"), ("cuda:99", "what this machine has: .*cpu")]
)
def test_devices_that_are_not_there_are_refused(name: str, words: str) -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(PatError, match=words):
        resolve_device(name)


def test_an_output_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path, words in ((tmp_path, "not empty"), (tmp_path / "notes.txt", "is not a folder")):
        with pytest.raises(PatError, match=words):
            BenchmarkOptions(**MODELS, output_dir=path)
    BenchmarkOptions(**MODELS, output_dir=tmp_path / "new")
