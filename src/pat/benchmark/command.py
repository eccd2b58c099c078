"""`pat benchmark`: two models side by side, measured in turns, beside what FLOP and byte counts predict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from pat.benchmark.checks import check_options, resolved_device
from pat.benchmark.figure import can_draw, draw
from pat.benchmark.measure import ROLES, Progress, measure
from pat.benchmark.options import BenchmarkOptions
from pat.benchmark.prediction import Predictor
from pat.benchmark.process import Worker
from pat.benchmark.record import Benchmark, to_dict
from pat.benchmark.tables import markdown
from pat.report.records import write_record


def run_benchmark(options: BenchmarkOptions) -> Benchmark:
    """Compare two models, and write `results.json`, `results.md` and `speedup.png` if there is an output folder.

    Raises:
        PatError: see `check_options`; or a model cannot be loaded.
        RunFailed: the models do not fit into memory, or a process fails.
    """
    check_options(options)
    names = {"baseline": options.baseline, "model": options.model}
    predictors = {role: Predictor(names[role], options) for role in ROLES}
    device = resolved_device(options)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for role in ROLES:
            load = {"name": names[role], "dtype": options.dtype, "device": str(device), "threads": options.threads}
            workers[role] = stack.enter_context(Worker(load))
            workers[role].launch()
        facts = {role: workers[role].load() for role in ROLES}
        with _progress() as progress:
            rows = measure(
                workers,
                options,
                max_positions={role: predictors[role].max_positions for role in ROLES},
                progress=progress,
            )
    benchmark = Benchmark(
        options=options,
        device=str(device),
        facts=facts,
        predicted_weight_bytes={role: predictors[role].weight_bytes for role in ROLES},
        rows=rows,
        predictions={
            (row.batch_size, row.context): {role: predictors[role].at(row.batch_size, row.context) for role in ROLES}
            for row in rows
        },
    )
    if options.output_dir is not None:
        _write(benchmark)
    return benchmark


def _write(benchmark: Benchmark) -> None:
    folder = benchmark.options.output_dir
    assert folder is not None
    write_record(folder / "results.json", to_dict(benchmark))
    (folder / "results.md").write_text(markdown(benchmark), encoding="utf-8")
    if can_draw():
        draw(benchmark, folder / "speedup.png")


@contextmanager
def _progress() -> Iterator[Progress]:
    """Yield a progress function that draws a bar on stderr if a person is looking."""
    with tqdm(desc="Settings", unit="setting", disable=None, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
