"""Which arithmetic a CPU trains in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pat.training import arguments
from pat.training.arguments import build_arguments
from pat.training.preflight import precision
from pat.training.run.run_file import RunFile
from tests.tiny_models import build

needs_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator has defaults of its own")


@needs_cpu
@pytest.mark.parametrize(
    ("flags", "pays", "expected"),
    [({}, True, True), ({}, False, False), ({"bf16": False}, True, False), ({"dtype": "bfloat16"}, True, False)],
)
def test_the_measurement_decides_unless_a_flag_does(
    flags: dict[str, Any], pays: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    build("llama", tied=True).save_pretrained(base)
    asked: list[tuple[int, int]] = []

    def answer(hidden_size: int, intermediate_size: int) -> bool:
        asked.append((hidden_size, intermediate_size))
        return pays

    monkeypatch.setattr(arguments, "bf16_pays_on_cpu", answer)
    built = build_arguments(
        model_name_or_path=str(base), dataset_name="data.jsonl", output_dir=str(tmp_path / "out"), **flags
    )
    assert built.sft.bf16 is expected
    assert len(asked) == (not flags)


def test_narrow_models_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pat.training.preflight.precision.time.process_time", lambda: pytest.fail("measured"))
    assert not precision.bf16_pays_on_cpu(precision.LEAST_HIDDEN_SIZE - 1, 4096)


@needs_cpu
def test_a_run_goes_on_in_the_arithmetic_that_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    build("llama", tied=True).save_pretrained(base)
    flags: dict[str, Any] = {"model_name_or_path": str(base), "dataset_name": "data.jsonl", "output_dir": str(out)}
    monkeypatch.setattr(arguments, "bf16_pays_on_cpu", lambda *sizes: True)
    began = build_arguments(**flags)
    out.mkdir()
    RunFile.of(began, AutoConfig.from_pretrained(base), "data").write(out)
    monkeypatch.setattr(arguments, "bf16_pays_on_cpu", lambda *sizes: False)
    assert build_arguments(**flags).sft.bf16
    assert not build_arguments(**flags, bf16=False).sft.bf16
