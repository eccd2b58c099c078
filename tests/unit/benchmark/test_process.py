"""The parent's end of a worker, with small programs in its place."""

import sys
from pathlib import Path

import pytest

from pat.benchmark.process import KILLED, Worker
from pat.errors import PatError, RunFailed

PRELUDE = """
import json, os, signal, sys
def answer(**facts): print(json.dumps(facts), flush=True)
requests = map(json.loads, sys.stdin)
"""


def worker(program: str, *arguments: str) -> Worker:
    return Worker({"name": "small"}, [sys.executable, "-c", PRELUDE + program, *arguments])


def loaded(program: str, *arguments: str) -> Worker:
    started = worker(program, *arguments)
    started.launch()
    started.load()
    return started


def test_requests_are_answered_one_by_one() -> None:
    with loaded("for request in requests: answer(echo=request)") as started:
        assert started.ask("prefill", batch_size=3)["echo"] == {"do": "prefill", "batch_size": 3}
        assert started.ask("release")["echo"] == {"do": "release"}


def test_a_process_that_the_system_kills_has_run_out_of_memory_and_is_started_again(tmp_path: Path) -> None:
    """It leaves a mark, so that the second life knows of the first."""
    program = """
for request in requests:
    with open(sys.argv[1], "a") as marks: marks.write(request["do"] + " ")
    if request["do"] == "prefill" and request["batch_size"] > 8: os.kill(os.getpid(), signal.SIGKILL)
    answer(seconds=1.0)
"""
    marks = tmp_path / "marks"
    with loaded(program, str(marks)) as started:
        assert started.ask("prefill", batch_size=99) == {"error": "out_of_memory", "message": KILLED}
        assert started.ask("prefill", batch_size=1) == {"seconds": 1.0}
    assert marks.read_text().split() == ["load", "prefill", "load", "prefill"]


def test_any_other_death_fails_the_run_with_its_last_words() -> None:
    program = """
answer(**next(requests))
next(requests)
print("the first line\\nit broke", file=sys.stderr)
sys.exit(3)
"""
    with loaded(program) as started, pytest.raises(RunFailed, match="'small' ended with status 3: it broke"):
        started.ask("prefill")


def test_errors_in_answers_are_raised_by_their_kind() -> None:
    program = """
answer(**next(requests))
for request in requests: answer(error=request["do"], message="Because.")
"""
    with loaded(program) as started:
        with pytest.raises(RunFailed, match=r"'small' failed: Because\."):
            started.ask("failed")
        with pytest.raises(PatError, match=r"Because\.") as raised:
            started.ask("bad_input")
        assert raised.value.exit_status == 2
        assert started.ask("out_of_memory") == {"error": "out_of_memory", "message": "Because."}


@pytest.mark.parametrize(
    "program",
    ['next(requests); answer(error="out_of_memory", message="no room")', "os.kill(os.getpid(), signal.SIGKILL)"],
)
def test_a_model_that_does_not_fit_fails_the_run(program: str) -> None:
    with worker(program) as started:
        started.launch()
        with pytest.raises(RunFailed, match="'small' does not fit into memory"):
            started.load()


def test_closing_ends_the_process() -> None:
    with loaded("for request in requests: answer(pid=os.getpid())") as started:
        process = started._process
        assert process is not None and process.poll() is None
    assert process.returncode is not None
