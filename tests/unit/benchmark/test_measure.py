"""Turns, repetitions, and rows for what cannot be measured, with stand-ins for the two processes."""

import itertools
from typing import Any

import pytest

from pat.benchmark import measure as module
from pat.benchmark.measure import ROLES, Row, measure
from pat.benchmark.options import BenchmarkOptions

NO_LIMIT = dict.fromkeys(ROLES)


class FakeWorker:
    """Answers with made-up figures and notes what it is asked; memory ends at `capacity` tokens of a batch."""

    def __init__(self, role: str, log: list[tuple[str, str, int]], seconds: float, **capacity: int) -> None:
        self.role, self.log, self.seconds, self.capacity = role, log, seconds, capacity
        self.num_asked = 0

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        if action == "prefill":
            self.tokens = arguments["batch_size"] * arguments["context"]
        self.log.append((self.role, action, getattr(self, "tokens", 0)))
        if self.tokens > self.capacity.get(action, self.tokens):
            return {"error": "out_of_memory", "message": "no room"}
        self.num_asked += 1
        return {
            "seconds": self.seconds,
            "cpu_seconds": 2 * self.seconds,
            "peak_bytes": 100 + self.num_asked,
            "cache_bytes": 7,
        }


def run(
    *,
    baseline: dict[str, int] | None = None,
    model: dict[str, int] | None = None,
    limits: Any = NO_LIMIT,
    **options: Any,
) -> tuple[list[Row], list[tuple[str, str, int]]]:
    log: list[tuple[str, str, int]] = []
    workers = {
        "baseline": FakeWorker("baseline", log, 3.0, **(baseline or {})),
        "model": FakeWorker("model", log, 2.0, **(model or {})),
    }
    fields: dict[str, Any] = {"contexts": (4,), "batch_sizes": (1,), "new_tokens": 2, "repetitions": 3, "warmup": 1}
    return measure(workers, BenchmarkOptions("m", "b", **(fields | options)), max_positions=limits), log


def find(rows: list[Row], phase: str, batch_size: int, context: int = 4) -> Row:
    (row,) = (row for row in rows if (row.phase, row.batch_size, row.context) == (phase, batch_size, context))
    return row


def statuses(row: Row) -> tuple[str, str]:
    return row.results["baseline"].status, row.results["model"].status


def test_the_models_take_turns_and_each_begins_every_other_time() -> None:
    _, log = run()
    turns = [role for role, action, _ in log if action == "prefill"]
    assert turns == ["baseline", "model", "model", "baseline", "baseline", "model", "model", "baseline"]
    # A model generates right after it has read, while its cache is there.
    pairs = itertools.pairwise((role, action) for role, action, _ in log if action != "release")
    assert all(after == (role, "decode") for (role, action), after in pairs if action == "prefill")


def test_the_warm_up_does_not_count() -> None:
    rows, log = run(repetitions=4, warmup=3)
    assert sum(action == "prefill" for _, action, _ in log) == 2 * 7
    prefill = find(rows, "prefill", 1)
    assert prefill.results["model"].seconds == (2.0,) * 4
    assert prefill.speedup is not None and prefill.speedup.median == 1.5
    assert prefill.cpu_speedup is not None and prefill.results["model"].cpu_seconds == (4.0,) * 4
    assert find(rows, "decode", 1).results["baseline"].cache_bytes == 7


def test_the_peak_is_the_highest_of_the_repetitions() -> None:
    rows, _ = run()
    assert find(rows, "decode", 1).results["model"].peak_bytes == 100 + 8


def test_without_new_tokens_there_is_no_generation() -> None:
    rows, log = run(new_tokens=0)
    assert [row.phase for row in rows] == ["prefill"]
    assert {action for _, action, _ in log} == {"prefill", "release"}


def test_out_of_memory_is_a_row_and_the_other_model_goes_on() -> None:
    rows, log = run(batch_sizes=(1, 2), baseline={"prefill": 4})
    assert statuses(find(rows, "prefill", 1)) == ("ok", "ok")
    for phase in ("prefill", "decode"):
        row = find(rows, phase, 2)
        assert statuses(row) == ("out_of_memory", "ok")
        assert row.results["baseline"].detail == "no room" and not row.results["baseline"].seconds
        assert len(row.results["model"].seconds) == 3
        assert row.speedup is None
    assert log.count(("baseline", "prefill", 8)) == 1  # not again after it has failed


def test_out_of_memory_while_generating_leaves_the_reading() -> None:
    rows, _ = run(model={"decode": 0})
    assert statuses(find(rows, "prefill", 1)) == ("ok", "ok")
    assert statuses(find(rows, "decode", 1)) == ("ok", "out_of_memory")


def test_what_is_larger_than_a_failure_is_not_tried() -> None:
    rows, log = run(contexts=(4, 8), batch_sizes=(1, 2), baseline={"prefill": 4}, model={"decode": 4})
    # Failed at 2 x 4; at the longer context 1 x 8 is no larger, and is tried; 2 x 8 is.
    assert [tokens for role, action, tokens in log if (role, action) == ("baseline", "prefill")] == [4] * 4 + [8, 8]
    assert "not tried" in find(rows, "prefill", 2, 8).results["baseline"].detail
    # Failing to generate says nothing about reading.
    assert find(rows, "prefill", 2, 8).results["model"].status == "ok"
    assert "not tried" in find(rows, "decode", 2, 8).results["model"].detail
    assert ("model", "decode", 16) not in log


def test_a_context_beyond_the_models_positions_is_a_row() -> None:
    rows, log = run(contexts=(4, 8), limits={"baseline": 9, "model": 7})
    assert statuses(find(rows, "decode", 1, 4)) == ("ok", "ok")
    assert statuses(find(rows, "prefill", 1, 8)) == ("ok", "too_long")
    # Generation would end at position 10.
    assert statuses(find(rows, "decode", 1, 8)) == ("too_long", "too_long")
    assert find(rows, "decode", 1, 8).results["baseline"].detail.startswith("needs 10 positions, the model has 9")
    assert ("model", "prefill", 8) not in log


def test_memory_is_released_after_every_setting_that_took_some() -> None:
    _, log = run(batch_sizes=(1, 2), baseline={"prefill": 4})
    assert [(role, tokens) for role, action, tokens in log if action == "release"] == [
        ("baseline", 4),
        ("model", 4),
        ("model", 8),
    ]


def test_late_repetitions_are_left_out_once_there_are_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    rows, _ = run(repetitions=20, max_seconds=1.0)
    assert len(find(rows, "prefill", 1).results["model"].seconds) == 3
    rows, _ = run(repetitions=20, max_seconds=55.0, warmup=0)
    assert len(find(rows, "prefill", 1).results["model"].seconds) == 5


def test_progress_is_told_after_every_setting() -> None:
    log: list[tuple[str, str, int]] = []
    workers = {role: FakeWorker(role, log, 1.0) for role in ROLES}
    seen: list[tuple[int, int]] = []
    options = BenchmarkOptions("m", "b", contexts=(2, 4), batch_sizes=(1, 3), repetitions=1)
    measure(workers, options, max_positions=NO_LIMIT, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
