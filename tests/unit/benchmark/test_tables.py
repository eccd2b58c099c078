"""The record of made-up measurements as tables, markdown and figure."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from pat.benchmark import tables
from pat.benchmark.command import BenchmarkRecord
from pat.benchmark.figure import draw
from pat.benchmark.host import ModelFacts
from pat.benchmark.measure import Measurement, Row
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.prediction import Phase
from pat.benchmark.tables import print_benchmark, to_markdown
from pat.report.figure import can_draw

LONG_ERROR = "CUDA out of memory. " + "Tried to allocate very much. " * 20


def row(phase: Phase, batch_size: int, baseline: list[float], model: list[float]) -> Row:
    sides = [
        Measurement(1.0, seconds=seconds, cpu_seconds=seconds, peak_bytes=peak, cache_bytes=1)
        if seconds
        else Measurement(1.0, "out_of_memory", LONG_ERROR)
        for seconds, peak in ((baseline, 900_000_000), (model, 700_000_000))
    ]
    made = Row(phase, batch_size, 128, *sides, predicted_speedup=4 / 3, predicted_memory_ratio=1.32)
    made.finish(10)
    return made


@pytest.fixture
def record(tmp_path: Path) -> BenchmarkRecord:
    def facts(name: str, num_parameters: int) -> ModelFacts:
        size = 4 * num_parameters
        return ModelFacts(name, num_parameters, size, "float32", 500_000_000, size, 1, True)

    return BenchmarkRecord(
        options=BenchmarkOptions("out/model", "base", [128], [1, 8], new_tokens=10, output_dir=tmp_path),
        device="cpu",
        models={"baseline": facts("base", 100_000_000), "model": facts("out/model", 75_000_000)},
        predicted_weight_bytes={"baseline": 400_000_000, "model": 300_000_000},
        settings=[
            row("prefill", 1, [0.2, 0.2, 0.2], [0.16, 0.16, 0.16]),
            row("decode", 1, [0.5, 0.5, 0.5], [0.4, 0.4, 0.4]),
            row("prefill", 8, [], [1.5, 1.5, 1.5]),
            row("decode", 8, [], [4.0, 4.0, 4.0]),
        ],
    )


def test_a_ratio_is_of_pairs_and_is_said_to_be_no_quotient_of_the_columns(
    record: BenchmarkRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    print_benchmark(replace(record, settings=[row("decode", 1, [0.2, 0.3, 0.5], [0.1, 0.3, 0.4])]))
    printed = capsys.readouterr().out
    (cells,) = [line.split("│")[3:6] for line in printed.splitlines() if "33.3" in line]
    assert [cell.strip() for cell in cells] == ["33.3", "33.3", "1.25x"]  # ratios of 2, 1 and 1.25
    assert "the median of the ratios of pairs" in printed and "medians of their own" in printed


def test_tables_show_figures_ratios_and_what_is_missing(
    record: BenchmarkRecord, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "can_draw", lambda: False)
    monkeypatch.setenv("COLUMNS", "80")
    print_benchmark(record)
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert all(len(line) <= 80 for line in printed.splitlines() if "│" in line)
    assert ["parameters", "100,000,000", "75,000,000", "1.33x"] in cells
    assert ["1", "128", "200.0", "160.0", "1.25x", "1.25–1.25", "1.33x", "94%"] in cells
    assert ["1", "128", "20.0", "25.0", "1.25x", "1.25–1.25", "1.33x", "94%"] in cells
    # Above the 500 MB that the process took without a model, and only where both were measured.
    assert ["1", "128", "900.0 MB", "700.0 MB", "2.00x", "1.32x"] in cells
    assert ["8", "128", "–", "700.0 MB", "–", "1.32x"] in cells
    assert printed.count("Out of memory (baseline, prefill at batch 8, context 128): CUDA out of memory.") == 1
    assert LONG_ERROR not in printed
    assert "pip install 'pat-llm[figures]'" in printed


def test_markdown_holds_the_same_cells(record: BenchmarkRecord) -> None:
    text = to_markdown(record)
    assert "| 1 | 128 | 200.0 | 160.0 | 1.25x | 1.25–1.25 | 1.33x | 94% |" in text
    assert "| 8 | 128 | out of memory | 1,500 | – | – | 1.33x | – |" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Models",
        "## Prefill: milliseconds until a batch is read",
        "## Decode: tokens in a second, all sequences together",
        "## Memory at its peak",
    ]


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
def test_the_figure_is_a_picture_of_both_phases(record: BenchmarkRecord, tmp_path: Path) -> None:
    draw(record, tmp_path / "speedup.png")
    data = (tmp_path / "speedup.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800 and height > 500 and len(data) > 10_000
