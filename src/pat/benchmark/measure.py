"""Measure two models in turns, setting by setting; what cannot be measured becomes a row that says why."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from pat.benchmark.host import OutOfMemory, Timing
from pat.benchmark.options import FEWEST_REPETITIONS, BenchmarkOptions
from pat.benchmark.prediction import Phase, Predictor
from pat.benchmark.worker import Worker
from pat.report import progress

ROLES = ("baseline", "model")

PHASES: tuple[Phase, ...] = ("prefill", "decode")

Status = Literal["ok", "out_of_memory", "too_long"]


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements: half of them lie between the quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return median and quartiles of at least one value, interpolated between values."""
        lower, median, upper = statistics.quantiles(
            [*values, *values[:1]] if len(values) == 1 else values, n=4, method="inclusive"
        )
        return cls(median, lower, upper)


@dataclass
class Measurement:
    """One phase of one model at one setting."""

    counted: float
    """FLOPs of reading the batch, or bytes read for one new token of each of its sequences."""
    status: Status = "ok"
    detail: str = ""
    """Why there are no figures."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of every repetition, in which the whole batch is read, or all new tokens are generated."""
    cpu_seconds: list[float] = field(default_factory=list)
    """CPU seconds of all threads of the process, by repetition."""
    tokens_per_second: float | None = None
    """Number of tokens of the whole batch that are read or generated in a second, by the median."""
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    """Size of the caches at the end."""

    def fail(self, status: Status, detail: str) -> None:
        """Say that it could not be done to the end; what was measured until then does not count."""
        self.status, self.detail = status, detail
        self.seconds, self.cpu_seconds, self.peak_bytes, self.cache_bytes = [], [], None, None

    def add(self, timing: Timing) -> None:
        """Take one more repetition in."""
        self.seconds.append(timing.seconds)
        self.cpu_seconds.append(timing.cpu_seconds)
        self.peak_bytes = max(self.peak_bytes or 0, timing.peak_bytes)
        self.cache_bytes = timing.cache_bytes


@dataclass
class Row:
    """Both models in one phase at one setting."""

    phase: Phase
    batch_size: int
    context: int
    baseline: Measurement
    model: Measurement
    predicted_speedup: float
    """Ratio of FLOPs for a prefill, of bytes read for generation."""
    predicted_memory_ratio: float
    """Ratio of weights and caches together when the last token is generated."""
    speedup: Spread | None = None
    """Seconds of the baseline over the model's, in pairs; None if one of them has none."""
    cpu_speedup: Spread | None = None
    """The same ratio of CPU seconds, which says something where the CPU does the work."""

    def of(self, role: str) -> Measurement:
        """Return the measurement of one of `ROLES`."""
        return cast(Measurement, getattr(self, role))

    def finish(self, new_tokens: int) -> None:
        """Work out what follows from the repetitions.

        Measurements that were taken next to each other are divided, so that a machine that slows down between two
        pairs does not count as a difference between the models.
        """
        num_tokens = self.batch_size * (self.context if self.phase == "prefill" else new_tokens)
        for side in (self.baseline, self.model):
            if side.status == "ok":
                side.tokens_per_second = num_tokens / statistics.median(side.seconds)
        if self.baseline.status == self.model.status == "ok":
            for name, source in (("speedup", "seconds"), ("cpu_speedup", "cpu_seconds")):
                pairs = zip(getattr(self.baseline, source), getattr(self.model, source), strict=True)
                setattr(self, name, Spread.of([slow / fast for slow, fast in pairs]))


@dataclass
class _Limits:
    """The settings that a model is known to fail at."""

    max_positions: int | None
    failures: list[tuple[Phase, int, int]] = field(default_factory=list)
    """Phase, batch size and context at which memory ran out."""

    def look_at(self, row: Row, role: str, new_tokens: int) -> None:
        """Fail what need not be tried."""
        needed = row.context + (new_tokens if row.phase == "decode" else 0)
        if self.max_positions is not None and needed > self.max_positions:
            detail = f"needs {needed} positions, the model has {self.max_positions} (max_position_embeddings)"
            row.of(role).fail("too_long", detail)
        for phase, size, length in self.failures:
            # Generation starts with reading; trying more of what the system kills a process for helps nobody.
            if phase in ("prefill", row.phase) and row.batch_size >= size and row.context >= length:
                row.of(role).fail("out_of_memory", f"larger than batch {size}, context {length}, so not tried")


def measure(
    workers: Mapping[str, Worker],
    options: BenchmarkOptions,
    predictors: Mapping[str, Predictor],
) -> list[Row]:
    """Measure both models (by `ROLES`) at every setting, taking turns: baseline, model, model, baseline, and again.

    Returns:
        A row for each phase and setting, contexts outermost. A setting for which memory does not suffice has a row as
        well, and so have larger ones, which are not tried.
    """
    limits = {role: _Limits(predictors[role].max_positions) for role in ROLES}
    settings = [(context, size) for context in options.contexts for size in options.batch_sizes]
    rows: list[Row] = []
    with progress.phase("Measuring", "settings", total=len(settings)) as shown:
        for context, batch_size in shown.over(settings):
            of_setting = {}
            for phase in PHASES if options.new_tokens else PHASES[:1]:
                baseline, model = (predictors[role].count(phase, batch_size, context) for role in ROLES)
                heavy, light = (predictors[role].memory_bytes(batch_size, context) for role in ROLES)
                sides = Measurement(baseline), Measurement(model)
                of_setting[phase] = Row(phase, batch_size, context, *sides, baseline / model, heavy / light)
            _measure_setting(workers, options, limits, of_setting)
            rows += of_setting.values()
    return rows


def _measure_setting(
    workers: Mapping[str, Worker], options: BenchmarkOptions, limits: Mapping[str, _Limits], rows: Mapping[Phase, Row]
) -> None:
    for row in rows.values():
        for role in ROLES:
            limits[role].look_at(row, role, options.new_tokens)
    start = time.monotonic()
    for repetition in range(options.warmup + options.repetitions):
        late = options.max_seconds is not None and time.monotonic() - start > options.max_seconds
        if late and repetition >= options.warmup + FEWEST_REPETITIONS:
            break
        for role in ROLES if repetition % 2 == 0 else reversed(ROLES):
            _repeat(workers[role], role, options, limits[role], rows, repetition)
    for role in ROLES:
        if rows["prefill"].of(role).status == "ok":
            workers[role].ask("release")
    for row in rows.values():
        row.finish(options.new_tokens)


def _repeat(
    worker: Worker, role: str, options: BenchmarkOptions, limits: _Limits, rows: Mapping[Phase, Row], repetition: int
) -> None:
    """Have one model do every phase once; what it cannot do, what comes after it cannot be done either."""
    for phase, row in rows.items():
        if row.of(role).status != "ok":
            return
        try:
            if phase == "prefill":
                keep = "decode" in rows and rows["decode"].of(role).status == "ok"
                size = {"batch_size": row.batch_size, "context": row.context}
                timing = worker.ask("prefill", **size, seed=repetition, keep=keep)
            else:
                timing = worker.ask("decode", new_tokens=options.new_tokens)
        except OutOfMemory as error:
            limits.failures.append((phase, row.batch_size, row.context))
            for later in PHASES[PHASES.index(phase) :]:
                if later in rows:
                    rows[later].of(role).fail("out_of_memory", str(error))
            return
        if repetition >= options.warmup:
            row.of(role).add(timing)
