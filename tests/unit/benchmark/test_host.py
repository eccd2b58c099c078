"""The process of one model: what it measures, and that memory errors leave it alive."""

import gc
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tiny_models import build

from pat.benchmark.host import Host, OutOfMemory, answer
from pat.benchmark.memory import MemoryMeter, is_out_of_memory
from pat.benchmark.prediction import Predictor
from pat.errors import PatError, RunFailed

IMPOSSIBLE_BATCH = 10**13
"""More bytes of token ids than a process can address."""

LOAD: dict[str, Any] = {"dtype": None, "device": "cpu", "threads": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build("llama", tied=True).save_pretrained(folder)
    return str(folder)


def test_what_is_measured_is_what_was_predicted(model: str) -> None:
    gc.collect()  # what other tests have left would be given back in between, and a peak lie below the beginning
    host, predictor = Host(model, **LOAD), Predictor(model, dtype=None, new_tokens=3)
    read = host.prefill(batch_size=2, context=8, seed=0, keep=True)
    generated = host.decode(new_tokens=3)
    assert host.facts.num_parameters == sum(p.numel() for p in build("llama", tied=True).parameters())
    assert host.facts.weight_bytes == predictor.weight_bytes
    assert host.facts.weight_bytes + generated.cache_bytes == predictor.memory_bytes(2, 8)
    assert min(read.seconds, generated.seconds, read.cpu_seconds, generated.cpu_seconds) > 0
    assert read.peak_bytes > host.facts.process_bytes > 0


def test_mapped_weights_are_in_memory_once_the_model_is_loaded(tmp_path: Path) -> None:
    """Else the first measurement would read the file, and the memory that loading takes would be that of nothing."""
    build("llama", tied=False, vocab_size=200_000).save_pretrained(tmp_path)
    facts = Host(str(tmp_path), **LOAD).facts
    assert facts.weight_bytes > 70_000_000
    assert facts.loaded_bytes > 0.8 * facts.weight_bytes


def test_both_models_can_be_brought_to_one_dtype(model: str) -> None:
    half = Host(model, **LOAD | {"dtype": "bfloat16"}).facts
    assert half.dtype == "bfloat16"
    assert 2 * half.weight_bytes == Predictor(model, dtype="float32", new_tokens=1).weight_bytes


def read(batch_size: int, *, keep: bool = True) -> tuple[str, dict[str, Any]]:
    return "prefill", {"batch_size": batch_size, "context": 8, "seed": 0, "keep": keep}


def test_errors_are_answers_by_their_kind_and_the_next_request_is_done(model: str) -> None:
    ours, theirs = Pipe()
    requests = [("load", {"name": "/nowhere/model", **LOAD}), ("load", {"name": model, **LOAD})]
    requests += [read(IMPOSSIBLE_BATCH), read(-1), read(2, keep=False), ("decode", {"new_tokens": 1})]
    for request in requests:
        ours.send(request)
    answering = Thread(target=answer, args=(theirs,))
    answering.start()
    missing, _, large, broken, small, dropped = (ours.recv() for _ in requests)
    ours.close()
    answering.join(10)
    assert not answering.is_alive()  # it leaves when nobody asks any more
    assert type(missing) is PatError and "no such folder" in str(missing)
    assert type(large) is OutOfMemory and "memory" in str(large)
    assert type(broken) is RunFailed and "\n" not in str(broken)
    assert small.seconds > 0
    assert type(dropped) is RunFailed  # the cache is dropped unless it is to be used


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
    assert meter.resets
    meter.reset()
    before = meter.peak_bytes()
    block = torch.ones(size, dtype=torch.uint8)
    assert meter.current_bytes() - before > 0.9 * size
    del block
    assert meter.peak_bytes() - before > 0.9 * size
    meter.reset()
    assert meter.peak_bytes() - before < 0.5 * size
