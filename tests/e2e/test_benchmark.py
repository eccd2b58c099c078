"""`pat benchmark` on tiny models, with real processes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build

from pat import cli
from pat.report.figure import can_draw

TOO_LARGE = 10**13
"""Sequences whose token ids alone are more than a process can address."""


def flags(models: tuple[Path, Path], **more: object) -> list[str]:
    given = {"model": models[0], "baseline": models[1], "contexts": 8, "batch_sizes": 2, "repetitions": 2} | more
    return ["benchmark", "--device=cpu", *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    for hidden_size in (36, 48):
        build("llama", tied=True, hidden_size=hidden_size).save_pretrained(root / str(hidden_size))
    return root / "36", root / "48"


def figures(settings: list[dict[str, Any]], phase: str, batch_size: int, context: int) -> dict[str, Any]:
    keys = ("phase", "batch_size", "context")
    (row,) = (row for row in settings if tuple(row[key] for key in keys) == (phase, batch_size, context))
    return row


@pytest.mark.slow
def test_two_models_are_compared_and_the_record_is_complete(
    models: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = tmp_path / "benchmark.yaml"
    config.write_text(f"contexts: [8, 126]\nbatch_sizes: [1, {TOO_LARGE}]\nnew_tokens: 4\nwarmup: 0\nthreads: 1\n")
    arguments = [flag for flag in flags(models) if "contexts" not in flag and "batch_sizes" not in flag]
    assert cli.main([*arguments, "--config", str(config), "--output_dir", str(out), "--debug"]) == 0
    printed = capfd.readouterr()
    assert "out of" in printed.out and "too long" in printed.out
    assert all(line.startswith("Measuring: ") for line in printed.err.splitlines())  # if it took longer than a second

    record = json.loads((out / "results.json").read_text())
    assert not any(str(models[0].parent) in (out / name).read_text() for name in ("results.json", "results.md"))
    settings = record["settings"]
    assert len(settings) == 2 * 2 * 2
    small, base = record["models"]["model"], record["models"]["baseline"]
    predicted = record["predicted_weight_bytes"]
    assert small["weight_bytes"] == predicted["model"] < base["weight_bytes"] == predicted["baseline"]
    assert small["num_threads"] == 1

    prefill = figures(settings, "prefill", 1, 126)
    assert prefill["speedup"]["median"] > 0 and 1 < prefill["predicted_speedup"] < 48 / 36
    assert len(prefill["model"]["seconds"]) == len(prefill["baseline"]["seconds"]) == 2
    decode = figures(settings, "decode", 1, 8)
    held = {
        role: record["models"][role]["weight_bytes"] + decode[role]["cache_bytes"] for role in ("model", "baseline")
    }
    assert decode["predicted_memory_ratio"] == held["baseline"] / held["model"]
    assert all(decode[role]["peak_bytes"] > held[role] for role in held)
    assert figures(settings, "prefill", TOO_LARGE, 8)["model"]["status"] == "out_of_memory"
    # Position 130 of 128.
    assert figures(settings, "decode", 1, 126)["baseline"]["status"] == "too_long"

    assert (out / "results.md").read_text().count("\n| ---") == 4
    assert (out / "speedup.png").exists() == can_draw()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"contexts": "8,zero"}, "--contexts"),
        ({"repetitions": 0}, "repetitions=0"),
        ({"model": "/nowhere/model"}, "no such folder"),
        ({"new_tokens": "few"}, "--new_tokens"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    more: dict[str, Any], words: str, models: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(flags(models, **({"output_dir": tmp_path / "out"} | more))) == 2
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1 and words in printed.err
    assert not printed.out and not (tmp_path / "out").exists()
