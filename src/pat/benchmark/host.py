"""A model on a device, in a process of its own: what it is asked, it does and times.

A process for each model gives each its own peak memory, and one that the system kills leaves the other alone.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from pat.benchmark.memory import MemoryMeter, is_out_of_memory
from pat.checkpoint.card import shown_name
from pat.errors import PatError, RunFailed, one_line
from pat.loading import load_base

_PAGE = 4096
"""Number of bytes that the system reads of a mapped file at least."""


class OutOfMemory(RunFailed):
    """Memory, of whatever device, did not suffice for a request."""


@dataclass(frozen=True)
class ModelFacts:
    """A model as it was loaded."""

    name: str
    num_parameters: int
    weight_bytes: int
    dtype: str
    process_bytes: int
    """Memory in use before the model was loaded."""
    loaded_bytes: int
    """Memory that loading took."""
    num_threads: int
    peak_resets: bool
    """Whether a peak is that of one phase; if not, it is that of all so far."""


@dataclass(frozen=True)
class Timing:
    """One repetition of one phase."""

    seconds: float
    cpu_seconds: float
    """Time of all threads of the process; where other programs use the CPU as well, it is less noisy than seconds."""
    peak_bytes: int
    cache_bytes: int
    """Size of the cache at the end."""


class Host:
    """A model on a device, and what is left of the last request."""

    def __init__(self, name: str, *, dtype: str | None, device: str, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.meter = MemoryMeter(self.device)
        before = self.meter.current_bytes()
        self.model = load_base(name, dtype=dtype).to(self.device).eval()  # type: ignore[arg-type]
        weights = list(self.model.parameters())
        for weight in weights if self.device.type == "cpu" else ():
            weight.detach().flatten()[:: _PAGE // weight.element_size()].sum()  # what is mapped is read only now
        self._synchronize()
        self.facts = ModelFacts(
            name=shown_name(name),
            num_parameters=sum(p.numel() for p in weights),
            weight_bytes=sum(p.numel() * p.element_size() for p in weights),
            dtype=str(weights[0].dtype).removeprefix("torch."),
            process_bytes=before,
            loaded_bytes=self.meter.current_bytes() - before,
            num_threads=torch.get_num_threads(),
            peak_resets=self.meter.resets,
        )
        self._cache: DynamicCache | None = None
        self._next_ids: torch.Tensor | None = None

    def prefill(self, *, batch_size: int, context: int, seed: int, keep: bool) -> Timing:
        """Read a batch of random tokens, up to the logits of each sequence's next token; `keep` lets `decode` go on."""
        self._cache = self._next_ids = None
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(int(vocab_size), (batch_size, context), generator=generator).to(self.device)
        cache = DynamicCache(config=self.model.config)
        timing, next_ids = self._run(ids, cache, 1)
        if keep:
            self._cache, self._next_ids = cache, next_ids
        return timing

    def decode(self, *, new_tokens: int) -> Timing:
        """Generate greedily after what `prefill` has kept, one token of each sequence at a time."""
        cache, ids = self._cache, self._next_ids
        assert cache is not None and ids is not None
        self._cache = self._next_ids = None
        return self._run(ids, cache, new_tokens)[0]

    def release(self) -> None:
        """Give memory back that only the last requests needed: on a shared device the other model may want it."""
        self._cache = self._next_ids = None
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor, cache: DynamicCache, num_steps: int) -> tuple[Timing, torch.Tensor]:
        self.meter.reset()
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(num_steps):
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
        self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        layers: Any = cache.layers
        cached = sum(int(tensor.nbytes) for layer in layers for tensor in (layer.keys, layer.values))
        return Timing(seconds, cpu_seconds, self.meter.peak_bytes(), cached), ids

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def serve(connection: Connection) -> None:
    """Be the process of one model."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process in good order
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process lives
    with suppress(OSError):  # should memory run out, this process has to go before its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    answer(connection)


def answer(connection: Connection) -> None:
    """Answer requests, pairs of an action and its arguments, until the other end is closed; the first one is `load`.

    What is sent back is what the action returned, or the error that came of it.
    """
    host: Host | None = None
    while True:
        try:
            action, arguments = connection.recv()
        except EOFError:
            return
        outcome: Any
        try:
            if host is None:
                host = Host(**arguments)
                outcome = host.facts
            else:
                outcome = getattr(host, action)(**arguments)
        except PatError as error:
            outcome = error
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            outcome = OutOfMemory(reason) if is_out_of_memory(error) else RunFailed(f"{action} failed: {reason}")
        if isinstance(outcome, Exception) and host is not None:
            host.release()  # only now: the error's traceback holds on to the tensors of the request
        connection.send(outcome)
