"""`pat export`: what is asked for, what is refused before the work, and a file that takes its place whole."""

from pathlib import Path

import pytest

from pat import cli
from pat.checkpoint.staging import staged_file
from pat.errors import PatError
from pat.formats.command import ExportRecord, run_export
from pat.formats.options import ExportOptions

pytest.importorskip("gguf")

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories260K"


def export(output: Path, **options: object) -> ExportRecord:
    return run_export(ExportOptions(model=str(STORIES), format="gguf", output=output, **options))  # type: ignore[arg-type]


def test_a_model_becomes_a_file_of_the_predicted_size(tmp_path: Path) -> None:
    record = export(tmp_path / "stories.gguf", quantize="Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["stories.gguf"]
    assert record.files == {"stories.gguf": record.predicted_bytes}
    assert record.checks or any("xllamacpp is not installed" in sentence for sentence in record.not_checked)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "pickle"], "expected one of gguf, onnx, openvino"),
        (["--format", "gguf", "--quantize", "Q3"], "expected one of F32"),
        (["--format", "onnx", "--quantize", "Q8_0"], "it is for gguf alone"),
        (["--format", "onnx"], "expected a name that ends in .onnx"),
        (["--format", "gguf", "--quantize", "Q4_K_M"], "there is no llama-quantize on the PATH"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["export", "--model", str(STORIES), "--output", str(tmp_path / "x.gguf"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(PatError, match="exists already"):
        export(tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_file(tmp_path / "a.xml") as path:
        path.write_text("half")
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    with staged_file(tmp_path / "a.xml") as path:
        path.write_text("graph")
        path.with_suffix(".bin").write_text("weights")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.xml"]
