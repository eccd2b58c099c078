"""The record of made-up measurements: ratios, tables, markdown and figure."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from pat.benchmark import tables
from pat.benchmark.figure import can_draw, draw
from pat.benchmark.measure import Measurement, Phase, Row
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.prediction import SettingPrediction
from pat.benchmark.record import Benchmark, to_dict
from pat.benchmark.tables import markdown, print_benchmark

LONG_ERROR = "CUDA out of memory. " + "Tried to allocate very much. " * 20


def row(phase: Phase, batch_size: int, baseline: tuple[float, ...], model: tuple[float, ...]) -> Row:
    cache = 1_000_000 if phase == "decode" else None
    sides = {
        role: Measurement(
            seconds=seconds, cpu_seconds=tuple(2 * s for s in seconds), peak_bytes=peak, cache_bytes=cache
        )
        if seconds
        else Measurement("out_of_memory", LONG_ERROR)
        for role, seconds, peak in (("baseline", baseline, 900_000_000), ("model", model, 700_000_000))
    }
    return Row(phase, batch_size, 128, sides)


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    def facts(num_parameters: int) -> dict[str, Any]:
        return {
            "num_parameters": num_parameters,
            "weight_bytes": 4 * num_parameters,
            "dtype": "float32",
            "process_bytes": 500_000_000,
            "loaded_bytes": 4 * num_parameters,
            "num_threads": 1,
            "peak_memory_of": "request",
        }

    def prediction(share: float, batch_size: int) -> SettingPrediction:
        return SettingPrediction(share * batch_size * 4e9, share * 4e8, batch_size * 1_000_000)

    return Benchmark(
        options=BenchmarkOptions(
            "out/model", "base", contexts=(128,), batch_sizes=(1, 8), new_tokens=10, output_dir=tmp_path
        ),
        device="cpu",
        facts={"baseline": facts(100_000_000), "model": facts(75_000_000)},
        predicted_weight_bytes={"baseline": 400_000_000, "model": 300_000_000},
        rows=[
            row("prefill", 1, (0.2, 0.2, 0.2), (0.16, 0.16, 0.16)),
            row("decode", 1, (0.5, 0.5, 0.5), (0.4, 0.4, 0.4)),
            row("prefill", 8, (), (1.5, 1.5, 1.5)),
            row("decode", 8, (), (4.0, 4.0, 4.0)),
        ],
        predictions={
            (size, 128): {"baseline": prediction(1, size), "model": prediction(0.75, size)} for size in (1, 8)
        },
    )


def test_the_record_holds_measured_and_predicted_side_by_side(benchmark: Benchmark) -> None:
    record = json.loads(json.dumps(to_dict(benchmark), default=str))
    prefill, decode, failed, _ = record["settings"]
    assert prefill["speedup"]["median"] == pytest.approx(1.25)
    assert prefill["cpu_speedup"]["median"] == pytest.approx(1.25)
    assert prefill["predicted_speedup"] == pytest.approx(4 / 3)
    assert prefill["measured_over_predicted"] == pytest.approx(1.25 * 0.75)
    assert prefill["baseline"]["tokens_per_second"] == pytest.approx(128 / 0.2)
    assert decode["model"]["tokens_per_second"] == pytest.approx(10 / 0.4)
    assert decode["model"]["weight_and_cache_bytes"] == 300_000_000 + 1_000_000
    assert decode["model"]["predicted_weight_and_cache_bytes"] == 300_000_000 + 1_000_000
    assert decode["baseline"]["peak_bytes_beyond_process"] == 400_000_000
    assert failed["baseline"]["status"] == "out_of_memory" and failed["baseline"]["detail"] == LONG_ERROR
    assert failed["speedup"] is None and failed["measured_over_predicted"] is None
    assert failed["model"]["seconds"] == [1.5, 1.5, 1.5]
    assert record["models"]["model"]["name"] == "out/model"
    assert record["machine"] and record["versions"] and record["options"]["contexts"] == [128]


def test_tables_show_figures_ratios_and_what_is_missing(
    benchmark: Benchmark, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_benchmark(benchmark)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert ["parameters", "100,000,000", "75,000,000", "1.33x"] in cells
    assert ["1", "128", "200.0", "160.0", "1.25x", "1.25–1.25", "1.33x", "94%"] in cells
    assert ["1", "128", "20.0", "25.0", "1.25x", "1.25–1.25", "1.33x", "94%"] in cells
    # Above the 500 MB that the process took without a model, and only where both were measured.
    assert ["1", "128", "900.0 MB", "700.0 MB", "2.00x", "1.33x"] in cells
    assert ["8", "128", "–", "700.0 MB", "–", "1.32x"] in cells
    words = " ".join(printed.split())
    assert words.count("Out of memory (baseline, prefill at batch 8, context 128): CUDA out of memory.") == 1
    assert LONG_ERROR not in words


def test_markdown_holds_the_same_cells(benchmark: Benchmark) -> None:
    text = markdown(benchmark)
    assert "| 1 | 128 | 200.0 | 160.0 | 1.25x | 1.25–1.25 | 1.33x | 94% |" in text
    assert "| 8 | 128 | out of memory | 1,500 | – | – | 1.33x | – |" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("| ---")]
    assert widths == [5, 9, 9, 7]


def test_a_missing_matplotlib_is_one_line(
    benchmark: Benchmark, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "can_draw", lambda: False)
    print_benchmark(benchmark)
    assert "pip install 'pat-llm[figures]'" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
def test_the_figure_is_a_picture_of_both_phases(benchmark: Benchmark, tmp_path: Path) -> None:
    draw(benchmark, tmp_path / "speedup.png")
    data = (tmp_path / "speedup.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800 and height > 500 and len(data) > 10_000
