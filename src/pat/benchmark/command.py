"""`pat benchmark`: two models side by side, measured in turns, beside what FLOP and byte counts predict."""

from __future__ import annotations

from contextlib import ExitStack, closing
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pat.benchmark.host import ModelFacts
from pat.benchmark.measure import ROLES, Row, measure
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.prediction import Predictor
from pat.benchmark.worker import Worker
from pat.checkpoint.card import shown_name
from pat.checkpoint.places import RESULTS
from pat.loading.weights import resolve_device
from pat.report.records import Record, write_record


@dataclass(frozen=True, kw_only=True)
class BenchmarkRecord(Record):
    """Measurements of two models, and what was predicted for them."""

    command: Literal["benchmark"] = "benchmark"
    options: BenchmarkOptions
    device: str
    models: dict[str, ModelFacts]
    """Facts about the models that were loaded, by role."""
    predicted_weight_bytes: dict[str, int]
    settings: list[Row]


def run_benchmark(options: BenchmarkOptions) -> BenchmarkRecord:
    """Compare two models, and write `results.json`, `results.md` and `speedup.png` if there is an output folder.

    Raises:
        PatError: a model cannot be used, or there is no such device.
        RunFailed: the models do not fit into memory, or a process fails.
    """
    device = resolve_device(options.device)
    names = {"baseline": options.baseline, "model": options.model}
    predictors = {role: Predictor(names[role], dtype=options.dtype, new_tokens=options.new_tokens) for role in ROLES}
    with ExitStack() as stack:
        shared = {"dtype": options.dtype, "device": str(device), "threads": options.threads}
        # Both are started before one is asked: it takes them seconds to import what they need.
        workers = {role: stack.enter_context(closing(Worker({"name": names[role], **shared}))) for role in ROLES}
        models = {role: workers[role].load() for role in ROLES}
        rows = measure(workers, options, predictors)
    record = BenchmarkRecord(
        options=options,
        device=str(device),
        models=models,
        predicted_weight_bytes={role: predictors[role].weight_bytes for role in ROLES},
        settings=rows,
    )
    if options.output_dir is not None:
        _write(record)
    return record


def _write(record: BenchmarkRecord) -> None:
    from pat.benchmark.figure import draw
    from pat.benchmark.tables import to_markdown
    from pat.report.figure import can_draw

    folder = record.options.output_dir
    assert folder is not None
    options = copy(record.options)  # of paths only the last component is written
    options.model, options.baseline = shown_name(options.model), shown_name(options.baseline)
    options.output_dir = Path(folder.name)
    record = replace(record, options=options)
    write_record(folder / RESULTS, record)
    (folder / "results.md").write_text(to_markdown(record), encoding="utf-8")
    if can_draw():
        draw(record, folder / "speedup.png")
