"""Turns, repetitions, and rows for what cannot be measured, with stand-ins for the two processes."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from pat.benchmark import measure as module
from pat.benchmark.host import OutOfMemory, Timing
from pat.benchmark.measure import Row, Spread, measure
from pat.benchmark.options import BenchmarkOptions

Log = list[tuple[str, str, int]]
"""Role, action and tokens of the batch of every request."""


class FakeWorker:
    """Answers with made-up figures and notes what it is asked; memory ends at `capacity` tokens of a batch."""

    def __init__(self, role: str, log: Log, seconds: float, **capacity: int) -> None:
        self.role, self.log, self.seconds, self.capacity = role, log, seconds, capacity
        self.num_asked = 0

    def ask(self, action: str, **arguments: Any) -> Timing:
        if action == "prefill":
            self.tokens = arguments["batch_size"] * arguments["context"]
        self.log.append((self.role, action, getattr(self, "tokens", 0)))
        if self.tokens > self.capacity.get(action, self.tokens):
            raise OutOfMemory("no room")
        self.num_asked += 1
        return Timing(self.seconds, 2 * self.seconds, 100 + self.num_asked, 7)


def counts(weight: int, max_positions: int | None) -> Any:
    return SimpleNamespace(
        max_positions=max_positions,
        count=lambda phase, batch_size, context: weight * (2 if phase == "decode" else batch_size * context),
        memory_bytes=lambda batch_size, context: weight + batch_size * context,
    )


def run(
    *,
    baseline: dict[str, int] | None = None,
    model: dict[str, int] | None = None,
    positions: tuple[int | None, int | None] = (None, None),
    **options: Any,
) -> tuple[list[Row], Log]:
    log: Log = []
    workers = {
        "baseline": FakeWorker("baseline", log, 3.0, **(baseline or {})),
        "model": FakeWorker("model", log, 2.0, **(model or {})),
    }
    fields: dict[str, Any] = {"contexts": [4], "batch_sizes": [1], "new_tokens": 2, "repetitions": 3, "warmup": 1}
    predictors = {"baseline": counts(40, positions[0]), "model": counts(30, positions[1])}
    return measure(workers, BenchmarkOptions("m", "b", **(fields | options)), predictors), log  # type: ignore[arg-type]


def find(rows: list[Row], phase: str, batch_size: int, context: int = 4) -> Row:
    (row,) = (row for row in rows if (row.phase, row.batch_size, row.context) == (phase, batch_size, context))
    return row


def statuses(row: Row) -> tuple[str, str]:
    return row.baseline.status, row.model.status


def test_the_models_take_turns_and_each_begins_every_other_time() -> None:
    _, log = run()
    turns = [role for role, action, _ in log if action == "prefill"]
    assert turns == ["baseline", "model", "model", "baseline", "baseline", "model", "model", "baseline"]
    # A model generates right after it has read, while its cache is there.
    pairs = itertools.pairwise((role, action) for role, action, _ in log if action != "release")
    assert all(after == (role, "decode") for (role, action), after in pairs if action == "prefill")


def test_the_warm_up_does_not_count_and_what_follows_is_worked_out() -> None:
    rows, log = run(repetitions=4, warmup=3)
    assert sum(action == "prefill" for _, action, _ in log) == 2 * 7
    prefill, decode = find(rows, "prefill", 1), find(rows, "decode", 1)
    assert prefill.model.seconds == [2.0] * 4 and prefill.model.cpu_seconds == [4.0] * 4
    assert prefill.speedup == prefill.cpu_speedup == Spread(1.5, 1.5, 1.5)
    assert prefill.model.tokens_per_second == 4 / 2 and decode.baseline.tokens_per_second == 2 / 3
    assert decode.baseline.cache_bytes == 7
    assert decode.model.peak_bytes == 100 + 14  # the highest of the repetitions
    assert prefill.model.counted == 30 * 4 and prefill.predicted_speedup == 40 / 30
    assert decode.predicted_memory_ratio == 44 / 34


def test_quartiles_lie_between_the_measurements() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_machine_that_slows_down_does_not_count_as_a_difference() -> None:
    """Every pair says 1.25; the medians of what each model took in all say the same only by luck."""
    (row, *_), _ = run()
    row.model.seconds, row.baseline.seconds = [1.0, 2.0, 8.0], [1.25, 2.5, 10.0]
    row.finish(2)
    assert row.speedup == Spread(1.25, 1.25, 1.25)


def test_without_new_tokens_there_is_no_generation() -> None:
    rows, log = run(new_tokens=0)
    assert [row.phase for row in rows] == ["prefill"]
    assert {action for _, action, _ in log} == {"prefill", "release"}


def test_out_of_memory_is_a_row_and_the_other_model_goes_on() -> None:
    rows, log = run(batch_sizes=[1, 2], baseline={"prefill": 4})
    assert statuses(find(rows, "prefill", 1)) == ("ok", "ok")
    for phase in ("prefill", "decode"):
        row = find(rows, phase, 2)
        assert statuses(row) == ("out_of_memory", "ok")
        assert row.baseline.detail == "no room" and not row.baseline.seconds
        assert len(row.model.seconds) == 3
        assert row.speedup is None
    assert log.count(("baseline", "prefill", 8)) == 1  # not again after it has failed


def test_out_of_memory_while_generating_leaves_the_reading() -> None:
    rows, _ = run(model={"decode": 0})
    assert statuses(find(rows, "prefill", 1)) == ("ok", "ok")
    assert statuses(find(rows, "decode", 1)) == ("ok", "out_of_memory")


def test_what_is_larger_than_a_failure_is_not_tried() -> None:
    rows, log = run(contexts=[4, 8], batch_sizes=[1, 2], baseline={"prefill": 4}, model={"decode": 4})
    # Failed at 2 x 4; at the longer context 1 x 8 is no larger, and is tried; 2 x 8 is.
    assert [tokens for role, action, tokens in log if (role, action) == ("baseline", "prefill")] == [4] * 4 + [8, 8]
    assert "not tried" in find(rows, "prefill", 2, 8).baseline.detail
    # Failing to generate says nothing about reading.
    assert find(rows, "prefill", 2, 8).model.status == "ok"
    assert "not tried" in find(rows, "decode", 2, 8).model.detail
    assert ("model", "decode", 16) not in log


def test_a_context_beyond_the_models_positions_is_a_row() -> None:
    rows, log = run(contexts=[4, 8], positions=(9, 7))
    assert statuses(find(rows, "decode", 1, 4)) == ("ok", "ok")
    assert statuses(find(rows, "prefill", 1, 8)) == ("ok", "too_long")
    # Generation would end at position 10.
    assert statuses(find(rows, "decode", 1, 8)) == ("too_long", "too_long")
    assert find(rows, "decode", 1, 8).baseline.detail.startswith("needs 10 positions, the model has 9")
    assert ("model", "prefill", 8) not in log


def test_memory_is_released_after_every_setting_that_took_some() -> None:
    _, log = run(batch_sizes=[1, 2], baseline={"prefill": 4})
    released = [(role, tokens) for role, action, tokens in log if action == "release"]
    assert released == [("baseline", 4), ("model", 4), ("model", 8)]


def test_late_repetitions_are_left_out_once_there_are_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 10)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    rows, _ = run(repetitions=20, max_seconds=1.0)
    assert len(find(rows, "prefill", 1).model.seconds) == 3
    rows, _ = run(repetitions=20, max_seconds=55.0, warmup=0)
    assert len(find(rows, "prefill", 1).model.seconds) == 5
