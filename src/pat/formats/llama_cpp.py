"""llama.cpp: its tool `llama-quantize` writes other types, its server reads and goes on with tokens.

The tool is a program that is found on the PATH; the server is that of the package `xllamacpp`, in a process of its own,
because a model that llama.cpp cannot make sense of ends the process.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import IO, Any

from pat.errors import PatError, RunFailed, one_line

QUANTIZE, SERVER = "llama-quantize", "xllamacpp"

PATIENCE = 600
"""Seconds in which the server has to load a model, and to answer."""

CONTEXT = 2048
"""Tokens of prompt and answer that there is room for where a file is asked by the command that is printed."""

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens addresses of this machine itself, which no proxy reaches, whatever the environment says."""

_LISTENS = "pat: listens at "


def require_quantizer(kind: str) -> None:
    """Refuse a type of file that `llama-quantize` alone can write, if it is not there.

    Raises:
        PatError: it is not.
    """
    if shutil.which(QUANTIZE) is None:
        raise PatError(
            f"Got quantize={kind!r}, which llama.cpp's own tool writes, and there is no {QUANTIZE} on the PATH; "
            "install llama.cpp (github.com/ggml-org/llama.cpp, docs/install.md), or use Q8_0, BF16, F16 or F32."
        )


def engine_version() -> str | None:
    """Return the version of the server's package, None where it is not installed."""
    return version(SERVER) if find_spec(SERVER) else None


def command_to_ask(file: Path, *, has_chat: bool, num_threads: int | None = None) -> str:
    """Return a shell command that asks a GGUF file for a greedy answer, or has it go on with a text.

    Args:
        file: the GGUF file.
        has_chat: whether it has a chat template.
        num_threads: number of threads to ask for; None leaves it to llama.cpp, which takes one for each core.
    """
    given, place, answer = '"prompt": "Hello"', "completions", '["text"]'
    if has_chat:
        given, place, answer = (
            '"messages": [{"role": "user", "content": "Hello"}]',
            "chat_completions",
            '["message"]["content"]',
        )
    threads = "" if num_threads is None else f"p.cpuparams.n_threads = p.cpuparams_batch.n_threads = {num_threads}; "
    code = (
        f"import {SERVER} as x; p = x.CommonParams(); p.model.path = {json.dumps(str(file), ensure_ascii=False)}; "
        f"p.n_ctx, p.verbosity = {CONTEXT}, 0; {threads}"
        f'print(x.Server(p).handle_{place}({{{given}, "max_tokens": 100, "temperature": 0}})["choices"][0]{answer})'
    )
    return f"python -c {quote(code)}"


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write a GGUF file in another type, such as Q4_K_M.

    Raises:
        RunFailed: llama.cpp cannot.
    """
    command = [QUANTIZE, str(source), str(target), kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:  # such as a tool for another processor
        raise RunFailed(f"{QUANTIZE} could not be started ({error.strerror}).") from error
    if done.returncode:
        raise RunFailed(f"{QUANTIZE} could not write {kind}: {_reason(done.stderr + done.stdout)}.")


class Server:
    """A model in `llama-server`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self, text: str) -> list[int]:
        """Return the tokens that a text is read as."""
        return self._ask("tokenize", {"content": text, "add_special": True, "parse_special": False})

    def go_on(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Return the likeliest tokens behind a prompt, one after the other, beyond those that end a text."""
        found: list[int] = []
        request = {"samplers": ["top_k"], "top_k": 1, "return_tokens": True, "cache_prompt": False}
        while len(found) < num_tokens:
            asked = {"prompt": [*prompt, *found], "n_predict": num_tokens - len(found)}
            new = self._ask("completion", request | asked)
            if not new:
                raise RunFailed("it added no token to a prompt")
            found += new
        return found[:num_tokens]

    def _ask(self, place: str, request: dict[str, Any]) -> list[int]:
        """Return the tokens of an answer.

        Raises:
            OSError: there is no answer.
            RunFailed: the answer has no tokens.
        """
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self._url}/{place}", body, headers)
        with _DIRECT.open(asked, timeout=PATIENCE) as got:
            answer = got.read()
        try:
            return [int(token) for token in json.loads(answer)["tokens"]]
        except (ValueError, KeyError, TypeError) as error:
            raise RunFailed(f"it answered without tokens: {answer[:100]!r}") from error


@contextmanager
def serve(path: Path, context: int) -> Iterator[Server]:
    """Yield a GGUF file in a server of its own on this machine's CPU, with a cache in float32 as in transformers.

    Raises:
        RunFailed: llama.cpp cannot run it.
    """
    import torch  # the server's process, which runs this module, does without it

    request = json.dumps({"path": str(path), "context": context, "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "pat.formats.llama_cpp", request]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            with _ended_after(process, PATIENCE):
                address = _address(process.stdout)
            yield Server(address)
        except (OSError, RunFailed) as error:  # such as a connection that the server's end has closed
            process.kill()
            process.wait()
            log.seek(0)
            raise RunFailed(
                f"llama.cpp could not run {path.name}: {_reason(log.read()) or one_line(error)}."
            ) from error
        finally:
            process.kill()
            process.communicate()


@contextmanager
def _ended_after(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """End a process if the block takes longer, so that what waits for its output goes on."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _address(output: IO[str] | None) -> str:
    """Return where a server listens, which is the last word of the line that it prints."""
    assert output is not None, "a pipe was asked for"
    for line in output:
        if line.startswith(_LISTENS):
            return line.removeprefix(_LISTENS).strip()
    raise RunFailed(f"its server ended, or did not load the model in {PATIENCE} seconds")


def _run_server(path: str, context: int, threads: int) -> None:
    """Serve a file until nobody is there any more."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = path
    options.n_ctx, options.n_parallel, options.n_gpu_layers = context, 1, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.warmup = options.fit_params = False
    options.port = 0
    server = xllamacpp.Server(options)
    print(f"{_LISTENS}{server.listening_address}", flush=True)
    sys.stdin.read()


def _reason(log: str) -> str:
    """Return the line of a log that says what went wrong."""
    parts = re.split(r"\n|\d+\.\d{2}\.\d{3}\.\d{3} (?:[WI] )?", log)  # its times, before which it may break no line
    found = [part for part in parts if any(word in part.lower() for word in ("error", "assert", "fail"))]
    return " ".join((found[0] if found else "").split())[:300].rstrip(".")


if __name__ == "__main__":
    _run_server(**json.loads(sys.argv[1]))
