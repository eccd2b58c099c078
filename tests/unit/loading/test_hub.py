"""The hub is asked once: a model that it lacks is refused, and one in the cache is used without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tiny_models import build, fill_hub_cache, tiny_tokenizer

from pat.errors import PatError
from pat.file_sizes.gguf_vocabulary import stored_end_tokens
from pat.loading import load_config

ERRORS = {
    "removed": (404, "RepoNotFound"),
    "gone": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "cut": (404, "RevisionNotFound"),
}
"""Models of the server, with its answer; it hangs up when asked for any other."""

ASK = """
import sys
from pat.checkpoint.adapter_tokens import adapter_tokens
from pat.errors import PatError
from pat.file_sizes.gguf_vocabulary import stored_end_tokens
from pat.loading import load_base
from pat.loading.tokenizer import load_plain_tokenizer
folder, *names = sys.argv[1:]
for name in names:
    try:
        found = []
        if name != "some/words":
            config = load_base(name, revision="old" if name == "some/cut" else None).config
            found = [config.model_type, stored_end_tokens(name), len(adapter_tokens(folder, name, config).tokenizer)]
        print(*found, len(load_plain_tokenizer(name)))
    except PatError as error:
        print(error)
"""


@pytest.fixture
def hub() -> Iterator[tuple[str, Counter[str]]]:
    """The address of a hub, and how often it was asked for each of its models."""
    asked: Counter[str] = Counter()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.removeprefix("/api/models").split("/")[2]
            asked[name] += 1
            if name in ERRORS:
                status, code = ERRORS[name]
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_the_hub_is_asked_once(hub: tuple[str, Counter[str]], tmp_path: Path) -> None:
    address, asked = hub
    model, words = build("llama", tied=True), tmp_path / "words"
    model.save_pretrained(tmp_path / "model")
    rows = len(tiny_tokenizer(tmp_path / "model"))
    tiny_tokenizer(words)
    for name, folder in (("removed", tmp_path / "model"), ("cached", tmp_path / "model"), ("words", words)):
        fill_hub_cache(tmp_path / "hub", f"some/{name}", main=folder)
    mark = tmp_path / "hub" / "models--some--words" / ".no_exist" / f"{0:040x}" / "config.json"
    mark.parent.mkdir(parents=True)
    mark.touch()  # as a download leaves it, where the hub has no such file
    names = [f"some/{name}" for name in ("removed", "cached", "words", "gone", "gated", "cut", "silent")]
    # In a process of its own, since the libraries read their settings when they are imported.
    found = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path), *names],
        env={key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Retry" not in found.stderr
    said = dict(zip(names, found.stdout.splitlines(), strict=True))
    loaded = f"llama {stored_end_tokens(str(tmp_path / 'model'))} {rows} {rows}"
    assert [said.pop(f"some/{name}") for name in ("removed", "cached", "words")] == [loaded, loaded, str(rows)]
    assert found.stderr.count("The hub has no model 'some/removed' any more, or does not show it to you") == 1
    assert found.stderr.count(f"The hub cannot be reached at {address}") == 1
    for name, text in (
        ("some/gone", "the hub has no such model, or does not show it to you; check the name"),
        ("some/gated", "the hub shows it only to those who have been given access"),
        ("some/cut", "the hub has no such model at revision 'old'"),
        ("some/silent", f"is not in the hub's cache on this machine, and the hub cannot be reached at {address}"),
    ):
        assert said[name].startswith(f"Got the model '{name}', but there is no such folder") and text in said[name]
    # The libraries ask for more. What is in the cache is not asked for again once nobody answered.
    assert [asked[name.removeprefix("some/")] for name in names] == [int(name != "some/words") for name in names]


def test_offline_mode_is_named_where_it_is_the_reason() -> None:
    with pytest.raises(
        PatError, match=r"not in the hub's cache.*HF_HUB_OFFLINE=1.*pass a model folder, or unset HF_HUB_OFFLINE"
    ):
        load_config("nobody/nothing")
