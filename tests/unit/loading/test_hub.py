"""What the hub does not have, or nobody answers for, is refused after one request; what is in the cache is used."""

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
from tiny_models import build

from pat.errors import PatError
from pat.loading import load_config

ERRORS = {"gone": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "cut": (404, "RevisionNotFound")}
"""Models of the server, with its answer; it hangs up when asked for any other."""

ASK = """
import sys
from pat.errors import PatError
from pat.loading import load_config
for name in sys.argv[1:]:
    try:
        print(load_config(name, revision="old" if name == "some/cut" else None)[1].model_type)
    except PatError as error:
        print(error)
"""


@pytest.fixture
def hub() -> Iterator[tuple[str, Counter[str]]]:
    """The address of a hub, and how often it was asked for each of its models."""
    asked: Counter[str] = Counter()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.split("/")[2]
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
    cached = tmp_path / "hub" / "models--some--cached"
    build("llama", tied=True).config.save_pretrained(cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    names = [f"some/{name}" for name in (*ERRORS, "silent", "cached")]
    # In a process of its own, since the libraries read their settings when they are imported.
    found = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env={key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Retry" not in found.stderr
    said = dict(zip(names, found.stdout.splitlines(), strict=True))
    assert said.pop("some/cached") == "llama"
    for name, words in (
        ("some/gone", "the hub has no such model, or does not show it to you; check the name"),
        ("some/gated", "the hub shows it only to those who have been given access"),
        ("some/cut", "the hub has no such model at revision 'old'"),
        ("some/silent", f"is not in the hub's cache on this machine, and the hub cannot be reached at {address}"),
    ):
        assert said[name].startswith(f"Got the model '{name}', but there is no such folder") and words in said[name]
    assert [asked[name.removeprefix("some/")] for name in names] == [1] * len(names)  # the libraries ask for more


def test_offline_mode_is_named_where_it_is_the_reason() -> None:
    with pytest.raises(PatError, match=r"not in the hub's cache.*HF_HUB_OFFLINE=1.*pass a model folder"):
        load_config("nobody/nothing")
