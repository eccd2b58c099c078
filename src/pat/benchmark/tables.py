"""A benchmark as tables, for the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

from rich.console import Console
from rich.table import Table

from pat.benchmark.figure import MISSING, can_draw
from pat.benchmark.measure import PHASES, ROLES, Measurement, Phase, Row
from pat.benchmark.record import Benchmark
from pat.benchmark.statistics import Spread

_TITLES: dict[Phase, str] = {
    "prefill": "Prefill: milliseconds until a batch is read",
    "decode": "Decode: tokens in a second, all sequences together",
}

_REASON_LENGTH = 160
"""Characters of an error message; the record holds all of it."""

_STATUS = {"out_of_memory": "out of memory", "too_long": "too long"}


@dataclass(frozen=True)
class _Sheet:
    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def print_benchmark(benchmark: Benchmark) -> None:
    """Print a benchmark on standard output."""
    console = Console(highlight=False, markup=False)
    console.print(f"{_summary(benchmark)}\n")
    for sheet in _sheets(benchmark):
        table = Table(title=sheet.title, title_justify="left")
        for index, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="right" if index or heading.startswith("batch") else "left")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for note in _notes(benchmark):
        console.print(f"- {note}")
    folder = benchmark.options.output_dir
    if folder is not None:
        console.print(f"Figures: {folder}")
        if not can_draw():
            console.print(MISSING)


def markdown(benchmark: Benchmark) -> str:
    """Return a benchmark as a markdown document."""
    lines = ["# Benchmark", "", _summary(benchmark)]
    for sheet in _sheets(benchmark):
        lines += [
            "",
            f"## {sheet.title}",
            "",
            _line(sheet.headings),
            _line(["---"] + ["---:"] * (len(sheet.headings) - 1)),
        ]
        lines += map(_line, sheet.rows)
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(benchmark)), ""])


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _summary(benchmark: Benchmark) -> str:
    options, facts = benchmark.options, benchmark.facts
    dtypes = " and ".join(dict.fromkeys(facts[role]["dtype"] for role in ROLES))
    threads = f", {facts['model']['num_threads']} threads each" if benchmark.device == "cpu" else ""
    limited = "" if options.max_seconds is None else "up to "
    return (
        f"{options.model} beside {options.baseline} on {benchmark.device}, {dtypes}{threads}; "
        f"{limited}{options.repetitions} repetitions in turns, {options.warmup} for warming up."
    )


def _sheets(benchmark: Benchmark) -> list[_Sheet]:
    sheets = [_models(benchmark)]
    sheets += [_speed(benchmark, phase) for phase in PHASES if any(row.phase == phase for row in benchmark.rows)]
    return [*sheets, _memory(benchmark)]


def _models(benchmark: Benchmark) -> _Sheet:
    def row(name: str, cell: Callable[[str], float | None], unit: Callable[[float], str]) -> tuple[str, ...]:
        baseline, model = (cell(role) for role in ROLES)
        cells = ("–" if value is None else unit(value) for value in (baseline, model))
        return (name, *cells, f"{baseline / model:.2f}x" if baseline and model else "–")

    facts = benchmark.facts
    rows = [
        row("parameters", lambda role: facts[role]["num_parameters"], lambda count: f"{count:,}"),
        row("weights", lambda role: facts[role]["weight_bytes"], _megabytes),
        row("weights, predicted", lambda role: benchmark.predicted_weight_bytes[role], _megabytes),
        row("memory taken by loading", lambda role: facts[role]["loaded_bytes"], _megabytes),
    ]
    return _Sheet("Models", ("quantity", *ROLES, "ratio"), rows)


def _speed(benchmark: Benchmark, phase: Phase) -> _Sheet:
    def cell(row: Row, role: str) -> str:
        spread = row.results[role].spread
        if spread is None:
            return _STATUS[row.results[role].status]
        if phase == "prefill":
            return _milliseconds(spread.median)
        return f"{benchmark.tokens_per_second(row, role):,.1f}"

    rows = [
        (
            f"{row.batch_size}",
            f"{row.context}",
            *(cell(row, role) for role in ROLES),
            *_comparison(row.speedup, benchmark.predicted_speedup(row)),
        )
        for row in benchmark.rows
        if row.phase == phase
    ]
    return _Sheet(_TITLES[phase], ("batch", "context", *ROLES, "ratio", "quartiles", "predicted", "of it"), rows)


def _comparison(measured: Spread | None, predicted: float) -> tuple[str, ...]:
    if measured is None:
        return "–", "–", f"{predicted:.2f}x", "–"
    quartiles = f"{measured.lower_quartile:.2f}–{measured.upper_quartile:.2f}"
    return f"{measured.median:.2f}x", quartiles, f"{predicted:.2f}x", f"{measured.median / predicted:.0%}"


def _memory(benchmark: Benchmark) -> _Sheet:
    def above_process(peak: int, role: str) -> int:
        return peak - (benchmark.facts[role]["process_bytes"] or 0)

    rows = []
    for size, context in dict.fromkeys((row.batch_size, row.context) for row in benchmark.rows):
        # Reading a long text can take more than generating after it: the setting's peak is the higher of the two.
        phases = [row for row in benchmark.rows if (row.batch_size, row.context) == (size, context)]
        baseline, model = (_highest([row.results[role] for row in phases]) for role in ROLES)
        ratio = "–"
        if baseline is not None and model is not None:
            ratio = f"{above_process(baseline, 'baseline') / above_process(model, 'model'):.2f}x"
        peaks = ("–" if peak is None else _megabytes(peak) for peak in (baseline, model))
        predicted = benchmark.predicted_memory_ratio(size, context)
        rows.append((f"{size}", f"{context}", *peaks, ratio, f"{predicted:.2f}x"))
    return _Sheet("Memory at its peak", ("batch", "context", *ROLES, "ratio", "predicted"), rows)


def _highest(results: list[Measurement]) -> int | None:
    return max((result.peak_bytes for result in results if result.peak_bytes is not None), default=None)


def _notes(benchmark: Benchmark) -> list[str]:
    notes = [
        "Speed: median of the ratios of measurements taken next to each other. Predicted: ratio of FLOPs for prefill, "
        "of bytes read for decode. Of it: measured over predicted.",
    ]
    predicted = "Predicted: weights and cache alone."
    if benchmark.device == "cpu":
        before = _megabytes(benchmark.facts["model"]["process_bytes"] or 0)
        notes.append(
            f"Memory: the process's resident size; {before} of it were there before a model was loaded and do not "
            f"count in the ratio. {predicted}"
        )
    else:
        notes.append(
            "Memory: what the device's allocator gave out for one model; both were on the device all the time, so that "
            f"less was free than one alone would find. {predicted}"
        )
    if any(benchmark.facts[role]["peak_memory_of"] == "process" for role in ROLES):
        notes.append("This system cannot reset the peak: it is that of all settings so far.")
    dtypes = {benchmark.facts[role]["dtype"] for role in ROLES}
    if len(dtypes) > 1:
        notes.append(f"The models differ in dtype ({', '.join(sorted(dtypes))}); bytes count that, FLOPs do not.")
    return notes + _reasons(benchmark.rows)


def _reasons(rows: list[Row]) -> list[str]:
    """Say once for each reason why figures are missing, and where it came up first."""
    first: dict[tuple[str, str, str], str] = {}
    for row in rows:
        for role in ROLES:
            result = row.results[role]
            if result.status != "ok":
                where = f"{role}, {row.phase} at batch {row.batch_size}, context {row.context}"
                first.setdefault((role, result.status, result.detail), where)
    return [
        f"{_STATUS[status].capitalize()} ({where}): {shorten(detail, _REASON_LENGTH)}."
        for (_, status, detail), where in first.items()
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _megabytes(amount: float) -> str:
    return f"{amount / 1e6:,.1f} MB" if amount < 1e9 else f"{amount / 1e9:,.2f} GB"
