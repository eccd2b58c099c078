"""A benchmark as tables, for the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import shorten

from pat.benchmark.command import BenchmarkRecord
from pat.benchmark.measure import PHASES, ROLES, Row
from pat.benchmark.prediction import Phase
from pat.report.figure import MISSING, can_draw
from pat.report.table import Table

_TITLES: dict[Phase, str] = {
    "prefill": "Prefill: milliseconds until a batch is read",
    "decode": "Decode: tokens in a second, all sequences together",
}

_REASON_LENGTH = 160
"""Number of characters of an error message that are shown; the record holds all of it."""

_STATUS = {"out_of_memory": "out of memory", "too_long": "too long"}

NONE = "–"


def print_benchmark(record: BenchmarkRecord) -> None:
    """Print a benchmark on standard output."""
    print(f"{_summary(record)}\n")
    for table in _tables(record):
        table.print()
    for note in _notes(record):
        print(f"- {note}")
    if record.options.output_dir is not None:
        print(f"Figures: {record.options.output_dir}")
        if not can_draw():
            print(MISSING)


def to_markdown(record: BenchmarkRecord) -> str:
    """Return a benchmark as a markdown document."""
    parts = ["# Benchmark", _summary(record)]
    parts += [f"## {table.title}\n\n{table.to_markdown()}" for table in _tables(record)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _notes(record))]) + "\n"


def _summary(record: BenchmarkRecord) -> str:
    options, models = record.options, record.models
    dtypes = " and ".join(dict.fromkeys(models[role].dtype for role in ROLES))
    threads = f", {models['model'].num_threads} threads each" if record.device == "cpu" else ""
    limited = "" if options.max_seconds is None else "up to "
    return (
        f"{options.model} beside {options.baseline} on {record.device}, {dtypes}{threads}; "
        f"{limited}{options.repetitions} repetitions in turns, {options.warmup} for warming up."
    )


def _tables(record: BenchmarkRecord) -> list[Table]:
    phases = [phase for phase in PHASES if any(row.phase == phase for row in record.settings)]
    return [_models(record), *(_speed(record, phase) for phase in phases), _memory(record)]


def _models(record: BenchmarkRecord) -> Table:
    def row(label: str, values: list[int], unit: Callable[[float], str]) -> list[str]:
        baseline, model = values
        return [label, unit(baseline), unit(model), f"{baseline / model:.2f}x" if baseline > 0 < model else NONE]

    models = [record.models[role] for role in ROLES]
    predicted = [record.predicted_weight_bytes[role] for role in ROLES]
    rows = [
        row("parameters", [facts.num_parameters for facts in models], "{:,}".format),
        row("weights", [facts.weight_bytes for facts in models], _megabytes),
        row("weights, predicted", predicted, _megabytes),
        row("memory taken by loading", [facts.loaded_bytes for facts in models], _megabytes),
    ]
    return Table("Models", ["quantity", *ROLES, "ratio"], rows)


def _speed(record: BenchmarkRecord, phase: Phase) -> Table:
    def cell(row: Row, role: str) -> str:
        side = row.of(role)
        if side.tokens_per_second is None:
            return _STATUS[side.status]
        if phase == "decode":
            return f"{side.tokens_per_second:,.1f}"
        milliseconds = 1e3 * row.batch_size * row.context / side.tokens_per_second
        return f"{milliseconds:,.1f}" if milliseconds < 1e3 else f"{milliseconds:,.0f}"

    rows = [
        [f"{row.batch_size}", f"{row.context}", *(cell(row, role) for role in ROLES), *_comparison(row)]
        for row in record.settings
        if row.phase == phase
    ]
    columns = ["batch", "context", *ROLES, "ratio", "quartiles", "predicted", "of it"]
    return Table(_TITLES[phase], columns, rows, num_text_columns=0)


def _comparison(row: Row) -> list[str]:
    measured, predicted = row.speedup, row.predicted_speedup
    if measured is None:
        return [NONE, NONE, f"{predicted:.2f}x", NONE]
    quartiles = f"{measured.lower_quartile:.2f}–{measured.upper_quartile:.2f}"
    return [f"{measured.median:.2f}x", quartiles, f"{predicted:.2f}x", f"{measured.median / predicted:.0%}"]


def _memory(record: BenchmarkRecord) -> Table:
    rows = []
    for size, context in dict.fromkeys((row.batch_size, row.context) for row in record.settings):
        # Reading a long text can take more than generating after it: the setting's peak is the higher of the two.
        phases = [row for row in record.settings if (row.batch_size, row.context) == (size, context)]
        peaks = [max(row.of(role).peak_bytes or 0 for row in phases) for role in ROLES]
        ratio = NONE
        if all(peaks):
            baseline, model = (
                peak - record.models[role].process_bytes for peak, role in zip(peaks, ROLES, strict=True)
            )
            ratio = f"{baseline / model:.2f}x"
        cells = (_megabytes(peak) if peak else NONE for peak in peaks)
        rows.append([f"{size}", f"{context}", *cells, ratio, f"{phases[0].predicted_memory_ratio:.2f}x"])
    return Table("Memory at its peak", ["batch", "context", *ROLES, "ratio", "predicted"], rows, num_text_columns=0)


def _notes(record: BenchmarkRecord) -> list[str]:
    notes = [
        "Ratio of speed, above 1 where the model is faster: the median of the ratios of pairs, baseline and model "
        "measured next to each other. The two columns before it are medians of their own, so that dividing them comes "
        "to about the same, not to the same. Predicted: ratio of FLOPs for prefill, of bytes read for decode. Of it: "
        "measured over predicted.",
    ]
    if record.device == "cpu":
        before = _megabytes(record.models["model"].process_bytes)
        notes.append(
            f"Memory: the process's resident size; {before} of it were there before a model was loaded and do not "
            "count in the ratio. Predicted: weights and cache alone."
        )
    else:
        notes.append(
            "Memory: what the device's allocator gave out for one model; both were on the device all the time, so that "
            "less was free than one alone would find. Predicted: weights and cache alone."
        )
    if not all(facts.peak_resets for facts in record.models.values()):
        notes.append("This system cannot reset the peak: it is that of all settings so far.")
    dtypes = {facts.dtype for facts in record.models.values()}
    if len(dtypes) > 1:
        notes.append(f"The models differ in dtype ({', '.join(sorted(dtypes))}); bytes count that, FLOPs do not.")
    return notes + _reasons(record.settings)


def _reasons(rows: list[Row]) -> list[str]:
    """Say once for each reason why figures are missing, and where it came up first."""
    first: dict[tuple[str, str, str], str] = {}
    for row in rows:
        for role in ROLES:
            side = row.of(role)
            if side.status != "ok":
                where = f"{role}, {row.phase} at batch {row.batch_size}, context {row.context}"
                first.setdefault((role, side.status, side.detail), where)
    return [
        f"{_STATUS[status].capitalize()} ({where}): {shorten(detail, _REASON_LENGTH)}."
        for (_, status, detail), where in first.items()
    ]


def _megabytes(amount: float) -> str:
    return f"{amount / 1e6:,.1f} MB" if amount < 1e9 else f"{amount / 1e9:,.2f} GB"
