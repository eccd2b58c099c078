"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from pat.families import FAMILIES
from pat.file_sizes.predict import GGUF_TYPES
from pat.plan.command import PlanRecord
from pat.plan.cpu import CpuTime
from pat.plan.curves import print_measured
from pat.plan.guide import NOT_MEASURED, TrainingTime
from pat.plan.sharding import ShardedMemory
from pat.report import numbers
from pat.report.progress import clock
from pat.report.table import Table
from pat.shape import AXES, Shape
from pat.surgery.costs import GROUPS, ModelCost
from pat.widths import alignment

_ROTATIONS = {
    "pca": "PCA, exact in this family",
    "none": "none, because this family has norms between its writers and the residual stream",
    "open": "PCA among the channels whose final gain lies near its median, because the model is tied; only the weights "
    "can tell how many these are, and whether they are enough for this width",
}

MINUTE = 60.0
"""Number of seconds below which times on GPUs are not listed: what comes on top of them takes longer."""

HOUR = 3599.5
"""Number of seconds that are shown as an hour, once they are rounded."""


def print_plan(record: PlanRecord) -> None:
    """Print a plan on standard output: the shapes, what follows from them, and at the end which one to take."""
    print(f"{record.model_name_or_path} ({record.model_type}, {record.dtype}), hidden size {record.base.hidden_size}.")
    for candidate in record.candidates:
        nearby = ", ".join(map(_describe_width, candidate.nearby_widths))
        legal = f" Legal widths nearby: {nearby}." if nearby else ""
        print(f"{candidate.shape.describe()}: {candidate.shape.reason}.{legal}")
    if record.candidates[-1].shape.cuts("hidden"):
        print(f"Rotation: {_ROTATIONS[record.rotation]}.")
    print()
    for table in (_sizes(record), _files(record), _running(record), _training(record)):
        table.print()
    _print_times(record)
    if record.cpu_time is not None:
        _cpu(record, record.cpu_time).print()
    if record.sharded is not None:
        _sharding(record.sharded).print()
    _guide(record).print()
    if record.measured is not None:
        print_measured(record.measured)
    print("\nNotes")
    for note in (*record.notes, *_odd(record), *_not_measured()):
        print(f"- {note}")
    print(f"\n{record.recommendation}")


def _sizes(record: PlanRecord) -> Table:
    costs = _costs(record)
    rows = [
        [_label(group, record), *(f"{cost.groups[group].num_parameters:,}" for cost in costs)]
        for group in GROUPS
        if any(cost.groups[group].num_parameters for cost in costs)
    ]
    totals = [cost.total.num_parameters for cost in costs]
    rows += [
        ["total", *(f"{total:,}" for total in totals)],
        ["change", "", *(f"{total / totals[0] - 1:+.1%}" for total in totals[1:])],
        [f"bytes, {record.dtype}", *(numbers.scaled(cost.total.num_bytes, "B") for cost in costs)],
    ]
    return Table("Parameters", ["part", *_headings(record)], rows, num_totals=3)


def _files(record: PlanRecord) -> Table:
    files = [record.base_files, *(candidate.files for candidate in record.candidates)]

    def row(label: str, sizes: list[int | None]) -> list[str]:
        first = sizes[0]
        changes = ["" if size is None or first is None else f" ({size / first - 1:+.1%})" for size in sizes[1:]]
        shown = ["-" if size is None else numbers.scaled(size, "B") for size in sizes]
        return [label, *(size + change for size, change in zip(shown, ["", *changes], strict=True))]

    rows = [
        row("bfloat16", [f.bf16 for f in files]),
        row("int8, linear layers", [f.int8 for f in files]),
        row("int4, linear layers", [f.int4.num_bytes for f in files]),
        *(row(f"GGUF {kind}", [f.gguf.get(kind) for f in files]) for kind in GGUF_TYPES),
    ]
    return Table("File sizes (and their change)", ["stored as", *_headings(record)], [r for r in rows if any(r[1:])])


def _odd(record: PlanRecord) -> Iterator[str]:
    """Yield a note for each reason why a quantised file is larger, or slower, than its number of bits promises."""
    files = [record.base_files, *(candidate.files for candidate in record.candidates)]
    names = ["base", *(_sizes_of(candidate.shape) for candidate in record.candidates)]

    def each(shown: Iterable[str]) -> str:
        return "; ".join(f"{value} in {name}" for name, value in zip(names, shown, strict=True))

    def shares(found: list[float]) -> str | None:
        return f"of all parameters {each(f'{share:.0%}' for share in found)}" if any(found) else None

    groups = [f.int4.group_size for f in files]
    if len(set(groups)) > 1:
        yield f"int4 (AWQ, GPTQ), inputs that share a scale: {each(map(str, groups))}. Smaller groups take more bytes."
    if said := shares([sum(f.int4.odd_rows.values()) for f in files]):
        yield f"int4, in layers that no such group fits, and that stay in bfloat16: {said}."
    if said := shares([f.int4.off_tiles for f in files]):
        yield f"int4, in layers that are not made of whole 64 x 128 tiles, which vLLM's Marlin kernels pad: {said}."
    for kind in GGUF_TYPES:
        if said := shares([sum(f.odd_rows.get(kind, {}).values()) for f in files]):
            yield f"GGUF {kind}, in rows whose length does not fit its blocks, and that take a larger type: {said}."


def _label(group: str, record: PlanRecord) -> str:
    if group == "embedding" and all(cost.tied for cost in _costs(record)):
        return "tied embedding"
    if group == "MLP" and FAMILIES[record.model_type].expert_parameters:
        return "MLP, experts"
    return group


def _running(record: PlanRecord) -> Table:
    costs = _costs(record)

    def row(label: str, field: str, unit: str, speedups: list[float] | None = None) -> list[str]:
        cells = [numbers.scaled(getattr(cost, field), unit) for cost in costs]
        for place, speedup in enumerate(speedups or (), start=1):
            cells[place] += f" ({speedup:.2f}x)"
        return [label, *cells]

    prefill, decode = ([getattr(c, f"{kind}_speedup") for c in record.candidates] for kind in ("prefill", "decode"))
    rows = [
        row("prefill, per token", "prefill_flops_per_token", "FLOP", prefill),
        row("decode, per token", "decode_bytes_per_token", "B", decode),
        row("KV cache", "kv_cache_bytes", "B"),
        row("weights and cache", "inference_bytes", "B"),
    ]
    title = f"Running it on a text of {record.context:,} tokens (x: expected speed)"
    return Table(title, ["work or memory", *_headings(record)], rows)


def _training(record: PlanRecord) -> Table:
    memory = record.training
    exact = (
        ("base, frozen", memory.base_bytes),
        (f"adapter, {memory.num_trainable_parameters:,} parameters, and refit", memory.adapter_bytes),
        ("gradients and optimizer", memory.optimizer_bytes),
    )
    rows = [[label, *[numbers.scaled(size, "B")] * 2] for label, size in exact]
    for label, sizes in (
        ("activations, estimate", (memory.activation_bytes, memory.checkpointed_activation_bytes)),
        ("total", (memory.total_bytes, memory.checkpointed_total_bytes)),
    ):
        rows.append([label, *(numbers.scaled(size, "B") for size in sizes)])
    title = f"Memory for training, batches of {memory.batch_size} x {memory.length} tokens"
    return Table(title, ("purpose", "plain", "with gradient checkpointing"), rows, num_totals=1)


def _print_times(record: PlanRecord) -> None:
    what = f"LoRA on a million tokens in texts of {record.training.length}"
    times = record.training_times
    if all(time.fits and max(_gpu_seconds(time)) < MINUTE for time in times):
        names = ", ".join(time.hardware.name for time in times)
        print(f"{what} takes less than a minute on each of these GPUs alone, computed: {names}.")
        return
    rows = []
    unit, shown_as = _clock_of([each for time in times if time.fits for each in _gpu_seconds(time)])
    for time in times:
        how = "with gradient checkpointing" if time.gradient_checkpointing else "yes"
        shown = [shown_as(each) if time.fits else "" for each in _gpu_seconds(time)]
        rows.append([time.hardware.name, how if time.fits else "no", *shown])
    Table(f"{what} on one GPU, computed ({unit})", ["GPU", "fits", *_headings(record)], rows).print()


def _gpu_seconds(time: TrainingTime) -> list[float]:
    return [time.base_seconds, *time.small_seconds]


def _clock_of(seconds: Sequence[float]) -> tuple[str, Callable[[float], str]]:
    """Return in which units a table shows durations, the same in every cell, and what writes one so."""
    hours = max(seconds, default=0.0) >= HOUR
    return "hours:minutes:seconds" if hours else "minutes:seconds", partial(clock, hours=hours)


def _cpu(record: PlanRecord, time: CpuTime) -> Table:
    threads = "1 thread" if time.num_threads == 1 else f"{time.num_threads} threads"
    arithmetic = "bf16 autocast" if time.bf16 else "float32"
    seconds = [each for each in (time.base_seconds, *time.small_seconds) if each is not None]
    unit, shown_as = _clock_of(seconds)
    seen = "from a layer and the head as they ran just now" if time.fits else "not timed, since it does not fit"
    title = (
        f"Time of LoRA for a million tokens in texts of {record.training.length} on this machine's CPU, {threads}, "
        f"{arithmetic}, without gradient checkpointing, {seen} ({unit})"
    )
    cells = list(map(shown_as, seconds)) or [""] * len(_costs(record))
    return Table(title, ["", "fits", *_headings(record)], [["this CPU", "yes" if time.fits else "no", *cells]])


def _guide(record: PlanRecord) -> Table:
    rows = [
        [
            cut.model,
            f"{cut.pruning_ratio:.1%}",
            f"{cut.num_tokens:,}",
            f"{cut.above_lora:+.3f}",
            f"{cut.above_base:+.3f}",
            str(cut.num_seeds),
        ]
        for cut in record.guide
    ]
    title = (
        "What cutting MLP channels has cost elsewhere: held-out loss after training, in nats per token above (+) that "
        "of LoRA on the whole model, and of the untuned base"
    )
    return Table(title, ("model", "cut", "tokens", "against LoRA", "against base", "runs"), rows)


def _not_measured() -> Iterator[str]:
    for model, ratio in NOT_MEASURED:
        yield f"What a cut of {ratio:.1%} costs {model} beside LoRA has not been measured."


def _sharding(memory: ShardedMemory) -> Table:
    num = memory.num_nodes * memory.gpus_per_node
    rows = [
        [f"base, frozen, 1/{num} of it", numbers.scaled(memory.base_share_bytes, "B")],
        [f"adapter, gradients and optimizer, 1/{num} of them", numbers.scaled(memory.adapter_share_bytes, "B")],
        ["rotation, orders and refit, whole", numbers.scaled(memory.replicated_bytes, "B")],
        ["layers gathered at a time, embeddings and head", numbers.scaled(memory.gathered_bytes, "B")],
        ["activations with gradient checkpointing, estimate", numbers.scaled(memory.activation_bytes, "B")],
        ["each GPU, at its peak in a backward pass of stage one", numbers.scaled(memory.gpu_bytes, "B")],
        ["memory of each machine, while the base is loaded", numbers.scaled(memory.host_load_bytes, "B")],
        ["memory of the first machine, at the milestone", numbers.scaled(memory.host_cut_bytes, "B")],
    ]
    machines = "1 machine" if memory.num_nodes == 1 else f"{memory.num_nodes} machines"
    return Table(f"Sharded over {num} GPUs of {machines} (FSDP2)", ("purpose", "bytes"), rows, num_totals=3)


def _costs(record: PlanRecord) -> list[ModelCost]:
    return [record.base, *(candidate.cost for candidate in record.candidates)]


def _headings(record: PlanRecord) -> list[str]:
    return [
        "base",
        *(f"{_sizes_of(candidate.shape)} ({candidate.pruning_ratio:.1%} cut)" for candidate in record.candidates),
    ]


def _sizes_of(shape: Shape) -> str:
    words = {"hidden": "{}", "mlp": "MLP {}", "heads": "{} KV heads", "layers": "{} layers"}
    return ", ".join(words[name].format(shape.pruned(name)) for name in AXES if shape.cuts(name))


def _describe_width(width: int) -> str:
    best = alignment(width)
    return f"{width} (multiple of {best})" if best > 1 else str(width)
