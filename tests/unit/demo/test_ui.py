"""The page of the demo: what it shows, and that it is refused without gradio and reaches nobody."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from pat import cli
from pat.demo import options
from pat.demo.ui import Session, serve
from pat.errors import PatError

CHROMIUM = shutil.which("chromium")

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio, the extra `ui`, is not installed")


@pytest.fixture
def session(stories260k_path: Path, tmp_path: Path) -> Session:
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i * i}"} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags: dict[str, Any] = {"dataset_name": str(tmp_path / "data.jsonl"), "use_cpu": True, "bf16": False}
    return Session(stories260k_path, tmp_path / "out", flags | {"save_strategy": "no", "held_out": 4})


def test_choose_run_and_compare(session: Session) -> None:
    assert "| parameters |" in session.plan(0.25)
    assert "Run first" in session.answers("Once upon a time")[1]
    *states, summary = session.run(0.25, 2)
    assert any(states) and "| held-out loss |" in summary and "ratio-0.25-steps-2" in summary
    base, small = session.answers("Once upon a time")
    assert base and small and "Run first" not in small
    assert session.answers("  ") == ("", "")


def test_what_goes_wrong_is_shown(session: Session) -> None:
    session.flags["dataset_name"] = "nowhere.jsonl"
    *_, last = session.run(0.25, 2)
    assert last.startswith("The run has failed:") and "nowhere.jsonl" in last
    assert session.result is None


def test_without_gradio_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert cli.main(["demo", "--ui", "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'pat-llm[ui]'" in line
    assert cli.main(["demo", "--port", "7861", "--output_dir", str(tmp_path / "out")]) == 2
    assert "Got port=7861 without --ui" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_begins_again_beside_its_runs_at_a_port_that_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: True)
    (tmp_path / "out" / f"{options.RATIO}0.25-steps-2").mkdir(parents=True)
    options.DemoOptions(output_dir=tmp_path / "out", ui=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(PatError, match="the output folder is not empty"):
        options.DemoOptions(output_dir=tmp_path / "out", ui=True)
    with socket.socket() as taken:
        taken.bind((options.ADDRESS, 0))
        taken.listen()
        with pytest.raises(PatError, match="which cannot be used"):
            options.DemoOptions(output_dir=tmp_path / "new", ui=True, port=taken.getsockname()[1])


def test_one_run_at_a_time_and_with_steps(session: Session) -> None:
    assert list(session.run(0.25, None)) == ["Got no steps; expected at least 1."]
    session._running.acquire()
    assert list(session.run(0.25, 2)) == ["A run is going on already; wait for its end."]


def test_questions_that_cannot_be_answered_are_told_so_in_one_line(session: Session, tmp_path: Path) -> None:
    assert session.answers(None) == session.answers(" \n") == ("", "")
    base, small = session.answers("x" * 10_001)
    assert base == small == "Got a question of 10,001 letters; expected at most 10,000."
    shutil.copytree(session.base, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text()) | {"max_position_embeddings": 64}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    short = Session(tmp_path / "short", tmp_path / "out", {})
    assert "tokens; expected at most 4." in short.answers("Once upon a time there was a cat")[0]
    assert short.answers("a")[0] and "expected" not in short.answers("a")[0]
    gone = Session(tmp_path / "gone", tmp_path / "out", {})
    (line,) = gone.answers("Hello")[0].splitlines()
    assert line.startswith("No answer: ")


def ask(url: str, data: Any = None) -> tuple[int, str]:
    """Return status and text of an answer; what is sent that is no bytes is sent as JSON."""
    body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=120) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


@needs_gradio
@pytest.mark.slow
def test_the_page_over_http(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    blocks = serve(session, ratio=0.25, num_steps=2, block=False)
    calls = f"{blocks.local_url}gradio_api/call"

    def call(name: str, *data: Any) -> list[Any]:
        status, begun = ask(f"{calls}/{name}", {"data": data})
        assert status == 200, begun
        _, events = ask(f"{calls}/{name}/{json.loads(begun)['event_id']}")
        *_, last = events.split("event: complete\ndata: ")
        return list(json.loads(last))

    try:
        with urlopen(blocks.local_url) as answer:
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            page = answer.read().decode()
        assert "Share of all parameters to cut" in page and "Ask both models" in page
        assert "| parameters |" in call("plan", 0.25)[0]
        assert "Run first" in call("answers", "Once upon a time")[1]
        assert "| held-out loss |" in call("run", 0.25, 2)[0]
        base, small = call("answers", "Once upon a time")
        assert base and small and "Run first" not in small
        assert call("answers", "  ") == ["", ""] and "at most 10,000" in call("answers", "x" * 10_001)[0]
        capfd.readouterr()
        wrong = [(f"{calls}/answers", b"not JSON", 422), (f"{calls}/nothing", {"data": []}, 500)]
        wrong += [(f"{blocks.local_url}nowhere", None, 404), (f"{calls}/answers", [1], 422)]
        for url, data, expected in wrong:
            status, text = ask(url, data)
            assert status == expected and len(text.splitlines()) == 1 and "Traceback" not in text, text
        assert ask(f"{calls}/answers/unknown")[1].startswith("event: error")
        printed = capfd.readouterr().err
        assert "Traceback" not in printed and printed.count("The request to /gradio_api/call/") == 2
    finally:
        blocks.close()


@needs_gradio
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_in_a_browser(session: Session, tmp_path: Path) -> None:
    blocks = serve(session, ratio=0.25, num_steps=2, block=False)
    try:
        assert blocks.local_url.startswith("http://127.0.0.1:") and blocks.share_url is None
        with urlopen(blocks.local_url) as answer:
            assert "default-src 'self'" in answer.headers["content-security-policy"]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        flags += ["--virtual-time-budget=30000", "--window-size=1280,900", f"--screenshot={tmp_path / 'page.png'}"]
        done = subprocess.run(
            [str(CHROMIUM), *flags, "--dump-dom", blocks.local_url],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        for words in ("Share of all parameters to cut", "Nothing has run yet", "Ask both models", "parameters"):
            assert words in done.stdout
    finally:
        blocks.close()
