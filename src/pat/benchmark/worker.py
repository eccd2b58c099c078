"""One model in a process of its own. Reads requests, one JSON object a line, and answers each with one.

A process for each model gives each its own peak memory, and one that the system kills leaves the other alone.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import DynamicCache

from pat.benchmark.memory import MemoryMeter, is_out_of_memory
from pat.errors import PatError
from pat.loading import load_base

OUT_OF_MEMORY, BAD_INPUT, FAILED = "out_of_memory", "bad_input", "failed"
"""Kinds of errors in answers."""

_PAGE = 4096
"""Bytes that the system reads of a mapped file at least."""


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
        after = self.meter.current_bytes()
        self.facts = {
            "num_parameters": sum(p.numel() for p in weights),
            "weight_bytes": sum(p.numel() * p.element_size() for p in weights),
            "dtype": str(weights[0].dtype).removeprefix("torch."),
            "process_bytes": before,
            "loaded_bytes": None if after is None or before is None else after - before,
            "num_threads": torch.get_num_threads(),
            "peak_memory_of": self.meter.scope,
        }
        self._cache: DynamicCache | None = None
        self._next_ids: torch.Tensor | None = None

    @torch.inference_mode()
    def prefill(self, *, batch_size: int, context: int, seed: int, keep: bool) -> dict[str, Any]:
        """Read a batch of random tokens, up to the logits of each sequence's next token.

        Args:
            batch_size: sequences.
            context: tokens of each.
            seed: of the tokens.
            keep: whether `decode` is to go on from here.
        """
        self._drop()
        self.meter.reset()
        vocab_size = self.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(int(vocab_size), (batch_size, context), generator=generator).to(self.device)
        cache = DynamicCache(config=self.model.config)
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        if keep:
            self._cache, self._next_ids = cache, logits[:, -1:].argmax(-1)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": self.meter.peak_bytes()}

    @torch.inference_mode()
    def decode(self, *, new_tokens: int) -> dict[str, Any]:
        """Generate greedily after what `prefill` has kept, one token of each sequence at a time."""
        cache, ids = self._cache, self._next_ids
        assert cache is not None and ids is not None
        self.meter.reset()
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(new_tokens):
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
        self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        held = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
        cache_bytes = sum(int(tensor.numel() * tensor.element_size()) for tensor in held)
        self._drop()
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": self.meter.peak_bytes(),
            "cache_bytes": cache_bytes,
        }

    def release(self) -> dict[str, Any]:
        """Give memory back that only the last requests needed: on a shared device the other model may want it."""
        self._drop()
        gc.collect()
        if self.device.type != "cpu":
            empty: Callable[[], None] = getattr(torch.get_device_module(self.device), "empty_cache", lambda: None)
            empty()
        return {}

    def _drop(self) -> None:
        self._cache = self._next_ids = None

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more; the first one has to be `load`."""
    host: Host | None = None
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        action = request.pop("do")
        try:
            if action == "load":
                host = Host(**request)
                answer: dict[str, Any] = host.facts
            else:
                answer = getattr(host, action)(**request)
        except PatError as error:
            answer = {"error": BAD_INPUT, "message": str(error)}
        except Exception as error:
            kind = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            answer = {"error": kind, "message": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        if "error" in answer and host is not None:
            host.release()  # only now: the error's traceback holds on to the tensors of the request
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve requests on standard input; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process in good order
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with suppress(OSError):  # should memory run out, this process has to go before its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
