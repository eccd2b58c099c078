"""The process of one model: what it measures, and that memory errors leave it alive."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build

from pat.benchmark.memory import MemoryMeter, is_out_of_memory
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.prediction import Predictor
from pat.benchmark.worker import serve

IMPOSSIBLE_BATCH = 10**13
"""More bytes of token ids than a process can address."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build("llama", tied=True).save_pretrained(folder)
    return str(folder)


def load(name: str, **changed: Any) -> dict[str, Any]:
    return {"do": "load", "name": name, "dtype": None, "device": "cpu", "threads": None} | changed


def prefill(batch_size: int = 2, context: int = 8, *, keep: bool = True) -> dict[str, Any]:
    return {"do": "prefill", "batch_size": batch_size, "context": context, "seed": 0, "keep": keep}


def served(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_model_is_loaded_read_with_and_generated_from(model: str) -> None:
    facts, read, generated = served(load(model), prefill(), {"do": "decode", "new_tokens": 3})
    predictor = Predictor(model, BenchmarkOptions(model, model, new_tokens=3))
    assert facts["num_parameters"] == predictor.num_parameters
    assert facts["weight_bytes"] == predictor.weight_bytes
    assert facts["dtype"] == "float32"
    assert read["seconds"] > 0 and generated["seconds"] > 0
    assert read["cpu_seconds"] > 0
    assert read["peak_bytes"] > facts["process_bytes"] > 0
    # The measured memory of weights and cache is the predicted one.
    assert generated["cache_bytes"] == predictor.at(2, 8).kv_cache_bytes


def test_mapped_weights_are_in_memory_once_the_model_is_loaded(tmp_path: Path) -> None:
    """Else the first measurement would read the file, and the memory that loading takes would be that of nothing."""
    build("llama", tied=False, vocab_size=200_000).save_pretrained(tmp_path)
    (facts,) = served(load(str(tmp_path)))
    assert facts["weight_bytes"] > 70_000_000
    assert facts["loaded_bytes"] > 0.8 * facts["weight_bytes"]


def test_both_models_can_be_brought_to_one_dtype(model: str) -> None:
    full, half = served(load(model))[0], served(load(model, dtype="bfloat16"))[0]
    assert half["dtype"] == "bfloat16"
    assert full["weight_bytes"] == 2 * half["weight_bytes"]


def test_too_large_a_batch_is_an_answer_and_the_next_one_is_measured(model: str) -> None:
    _, large, small = served(load(model), prefill(IMPOSSIBLE_BATCH), prefill())
    assert large["error"] == "out_of_memory" and "memory" in large["message"]
    assert small["seconds"] > 0


def test_the_cache_is_dropped_unless_it_is_to_be_used(model: str) -> None:
    _, _, generated = served(load(model), prefill(keep=False), {"do": "decode", "new_tokens": 1})
    assert generated["error"] == "failed"


def test_other_errors_are_told_apart(model: str) -> None:
    (missing,) = served(load("/nowhere/model"))
    assert missing["error"] == "bad_input" and "no such folder" in missing["message"]
    _, broken = served(load(model), prefill(batch_size=-1))
    assert broken["error"] == "failed" and "\n" not in broken["message"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: …"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_all_kinds_of_memory_errors_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("memory")])
def test_other_errors_are_not_taken_for_them(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system cannot reset the peak")
def test_the_peak_is_that_since_the_last_reset() -> None:
    """A hundred megabytes stand out from whatever the interpreter does meanwhile."""
    meter, size = MemoryMeter(torch.device("cpu")), 100_000_000
    assert meter.scope == "request"
    meter.reset()
    before = meter.peak_bytes()
    block = torch.ones(size, dtype=torch.uint8)
    assert meter.current_bytes() - before > 0.9 * size  # type: ignore[operator]
    del block
    assert meter.peak_bytes() - before > 0.9 * size  # type: ignore[operator]
    meter.reset()
    assert meter.peak_bytes() - before < 0.5 * size  # type: ignore[operator]
