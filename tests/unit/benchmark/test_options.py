"""What `pat benchmark` refuses, in one line and before anything is loaded or written."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import build

from pat.benchmark.checks import check_options, parse_counts
from pat.benchmark.command import run_benchmark
from pat.benchmark.options import BenchmarkOptions
from pat.errors import PatError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build("llama", tied=True).config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("text", ["16,1,8", "16 1 8 8", "[16, 1, 8]", [16, 8, 1]])
def test_lists_are_read_in_any_form_and_sorted(text: Any) -> None:
    assert parse_counts(text, "batch_sizes") == (1, 8, 16)


@pytest.mark.parametrize("text", ["", ",", "0", "1,-8", "1,2.5", "many", ()])
def test_what_is_no_list_of_counts_is_refused(text: Any) -> None:
    with pytest.raises(PatError, match=r"batch_sizes=.* expected whole numbers above 0"):
        parse_counts(text, "batch_sizes")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"contexts": ()}, "contexts"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"repetitions": 0}, "repetitions=0; expected a whole number from 1"),
        ({"warmup": -1}, "warmup=-1; expected a whole number from 0"),
        ({"new_tokens": -1}, "new_tokens"),
        ({"threads": 0}, "threads=0"),
        ({"max_seconds": 0.0}, "max_seconds=0.0"),
        ({"dtype": "int8"}, "dtype='int8'; expected float32"),
        ({"dtype": "float31"}, "dtype='float31'"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"device": "cuda:99"}, "no such device"),
        ({"model": "/nowhere/model"}, "'/nowhere/model', but there is no such folder"),
        ({"baseline": "/nowhere/base"}, "'/nowhere/base', but there is no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_and_nothing_is_written(
    field: dict[str, Any], words: str, model: str, tmp_path: Path
) -> None:
    output_dir = tmp_path / "out"
    options = BenchmarkOptions(**({"model": model, "baseline": model, "output_dir": output_dir} | field))
    with pytest.raises(PatError, match=words):
        run_benchmark(options)
    assert not output_dir.exists()


def test_an_output_folder_that_is_not_empty_is_left_alone(model: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path, words in ((tmp_path, "not empty"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(PatError, match=words):
            run_benchmark(BenchmarkOptions(model, model, output_dir=path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    check_options(BenchmarkOptions(model, model, output_dir=tmp_path / "new"))


def test_quantised_models_are_refused(model: str, tmp_path: Path) -> None:
    config = build("llama", tied=True).config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    with pytest.raises(PatError, match="quantised"):
        check_options(BenchmarkOptions(model, str(tmp_path)))
