"""The parent's end of a model's process, with a script in the model's place."""

from contextlib import closing
from typing import Any

import pytest
import scripted_worker

from pat.benchmark.host import OutOfMemory
from pat.benchmark.worker import Worker
from pat.errors import PatError, RunFailed


def worker(**load: Any) -> Worker:
    return Worker({"name": "small", **load}, target=scripted_worker.serve)


def test_a_process_that_the_system_kills_has_run_out_of_memory_and_is_started_again() -> None:
    with closing(worker()) as started:
        assert started.load()[:2] == ("load", {"name": "small"})  # type: ignore[index]
        action, arguments, first = started.ask("prefill", batch_size=3)
        assert (action, arguments) == ("prefill", {"batch_size": 3})
        with pytest.raises(OutOfMemory, match="killed by the operating system"):
            started.ask("prefill", does="die")
        assert started.ask("prefill", batch_size=1)[2] != first
        with pytest.raises(PatError, match="Because") as raised:
            started.ask("decode", does="refuse")
        assert raised.value.exit_status == 2
        with pytest.raises(RunFailed, match="'small' ended with status 3"):
            started.ask("prefill", does="leave")
        process = started._process
    assert not process.is_alive()


def test_a_model_that_does_not_fit_fails_the_run() -> None:
    with (
        closing(worker(does="die")) as started,
        pytest.raises(RunFailed, match="'small' does not fit into memory") as raised,
    ):
        started.load()
    assert not isinstance(raised.value, OutOfMemory)
