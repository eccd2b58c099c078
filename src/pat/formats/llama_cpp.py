"""llama.cpp's own tools: `llama-quantize` writes other types of numbers, `llama-server` reads and goes on with tokens.

They are programs, found on the PATH; llama.cpp is on no index of Python packages in a form that runs everywhere. A model
that llama.cpp cannot make sense of ends the process, which therefore is not ours.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pat.errors import PatError, RunFailed, one_line

QUANTIZE, SERVER = "llama-quantize", "llama-server"

PATIENCE = 600
"""Seconds in which the server has to have loaded a model, or answered."""


def has_tool(name: str) -> bool:
    """Tell whether one of llama.cpp's tools is on the PATH."""
    return shutil.which(name) is not None


def require_quantizer(kind: str) -> None:
    """Refuse a kind of file that `llama-quantize` alone can write, if it is not there.

    Raises:
        PatError: it is not.
    """
    if not has_tool(QUANTIZE):
        raise PatError(
            f"Got quantize={kind!r}, which llama.cpp's own tool writes, and there is no {QUANTIZE} on the PATH; install "
            "llama.cpp (github.com/ggml-org/llama.cpp, docs/install.md), or use Q8_0, BF16, F16 or F32."
        )


def engine_version() -> str | None:
    """Return what `llama-server` says its version is, None where there is no such program."""
    if not has_tool(SERVER):
        return None
    done = subprocess.run([SERVER, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version:")]
    return lines[0].removeprefix("version:").strip() if lines else "unknown"


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write a GGUF file in another kind, such as Q4_K_M.

    Raises:
        RunFailed: llama.cpp cannot.
    """
    done = subprocess.run(  # noqa: S603
        [QUANTIZE, str(source), str(target), kind], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunFailed(f"{QUANTIZE} could not write {kind}: {_reason(done.stderr + done.stdout)}.")


class Server:
    """A model in `llama-server`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self, text: str) -> list[int]:
        """Return the tokens that a text is read as."""
        return list(self._ask("tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"])

    def go_on(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Return the likeliest tokens behind a prompt, one after the other; fewer where one of them ends the text."""
        request = {"prompt": list(prompt), "n_predict": num_tokens, "samplers": ["top_k"], "top_k": 1}
        answer = self._ask("completion", request | {"return_tokens": True, "cache_prompt": False})
        return list(answer["tokens"])

    def _ask(self, place: str, request: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self._url}/{place}", body, headers), timeout=PATIENCE) as got:
            answer: dict[str, Any] = json.load(got)
        return answer


@contextmanager
def serve(path: Path, context: int) -> Iterator[Server]:
    """Yield a GGUF file in a server of its own on this machine's CPU, with a cache in float32 as in transformers.

    Raises:
        RunFailed: llama.cpp cannot run it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model", str(path), "--port", str(port), "--ctx-size", str(context), "--parallel", "1"]
    flags += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--gpu-layers", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([SERVER, *flags, "--no-warmup"], stdout=log, stderr=log)  # noqa: S603
        try:
            _wait(process, f"http://127.0.0.1:{port}")
            yield Server(f"http://127.0.0.1:{port}")
        except (OSError, RunFailed) as error:  # such as a connection that the server's end has closed
            process.kill()
            process.wait()
            log.seek(0)
            raise RunFailed(f"llama.cpp could not run {path.name}: {_reason(log.read()) or one_line(error)}.") from error
        finally:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[Any], url: str) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < PATIENCE:
        if process.poll() is not None:
            raise RunFailed("it ended")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (urllib.error.URLError, OSError):  # not listening yet, or 503 while it loads
            time.sleep(0.05)
    raise RunFailed(f"it was not ready after {PATIENCE} seconds")


def _reason(log: str) -> str:
    """Return the line of a log that says what went wrong."""
    lines = [line for line in log.splitlines() if any(word in line.lower() for word in ("error", "assert", "fail"))]
    return " ".join((lines[0] if lines else "").split())[:300].rstrip(".")
