"""The part of a plan that is about training, as tables for people: memory and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pat.plan.command import PlanRecord
from pat.plan.cpu import CpuTime
from pat.plan.guide import MILLION, TrainingTime
from pat.plan.headings import headings
from pat.plan.sharding import ShardedMemory
from pat.report import numbers
from pat.report.progress import clock
from pat.report.table import Table

MINUTE = 60.0
"""Number of seconds below which times on GPUs are not listed: what comes on top of them takes longer."""

SHOWN_AS_AN_HOUR = 3599.5
"""Number of seconds that are shown as an hour, once they are rounded."""


def print_training(record: PlanRecord) -> None:
    """Print memory and time of the training."""
    _memory(record).print()
    _print_gpu_times(record)
    if record.cpu_time is None:
        print(
            "How long it takes on this CPU: --cpu_time measures it for some seconds, and tells how many steps "
            "(--max_steps of pat tune) fit into an hour."
        )
    else:
        _cpu(record, record.cpu_time).print()
        if record.cpu_time.fits:
            print(
                "Steps of shorter rows take less time. --max_steps sets their number for `pat tune`, which reads every "
                "row once without it."
            )
    if record.sharded is not None:
        _sharding(record.sharded).print()


def _memory(record: PlanRecord) -> Table:
    columns = [record.training, *record.training_after_cut]

    def row(label: str, field: str) -> list[str]:
        return [label, *(numbers.scaled(getattr(memory, field), "B") for memory in columns)]

    rows = [
        row("weights, frozen", "base_bytes"),
        ["trained parameters", *(f"{memory.num_trainable_parameters:,}" for memory in columns)],
        row("adapter", "adapter_bytes"),
        row("gradients, Adam", "optimizer_bytes"),
        row("activations", "activation_bytes"),
        row("total", "total_bytes"),
        row("with checkpointing", "checkpointed_total_bytes"),
    ]
    memory = record.training
    title = f"Memory for training on batches of {memory.batch_size} rows of {memory.length} tokens"
    return Table(title, ("purpose", "before the cut", *headings(record)[1 : len(columns)]), rows, num_totals=2)


def _print_gpu_times(record: PlanRecord) -> None:
    what = f"a million tokens in texts of {record.training.length}"
    times = record.training_times
    if all(time.fits and max(_gpu_seconds(time)) < MINUTE for time in times):
        *names, last = (time.hardware.name for time in times)
        print(
            f"Training on {what} takes less than a minute on any one of these GPUs, by the arithmetic of their data "
            f"sheets: {', '.join(names)} or {last}."
        )
        return
    rows = []
    unit, shown_as = _clock_of([each for time in times if time.fits for each in _gpu_seconds(time)])
    for time in times:
        how = "with gradient checkpointing" if time.gradient_checkpointing else "yes"
        shown = [shown_as(each) if time.fits else "" for each in _gpu_seconds(time)]
        rows.append([time.hardware.name, how if time.fits else "no", *shown])
    title = f"Time of training on {what} on one GPU, by the arithmetic of its data sheet ({unit})"
    Table(title, ["GPU", "fits", *headings(record)], rows).print()


def _gpu_seconds(time: TrainingTime) -> list[float]:
    return [time.base_seconds, *time.small_seconds]


def _clock_of(seconds: Sequence[float]) -> tuple[str, Callable[[float], str]]:
    """Return in which units a table shows durations, the same in every cell, and what writes one so."""
    hours = max(seconds, default=0.0) >= SHOWN_AS_AN_HOUR
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
    cells = list(map(shown_as, seconds)) or [""] * (1 + len(record.candidates))
    rows = [["this CPU", "yes" if time.fits else "no", *cells]]
    memory = record.training
    steps = [each * memory.batch_size * memory.length / MILLION for each in seconds]
    if all(steps) and steps:
        rows.append(
            [
                f"a step of {memory.batch_size} x {memory.length}",
                "",
                *(f"{each:,.2g} s" if each < 10 else f"{each:,.0f} s" for each in steps),
            ]
        )
        rows.append(["steps an hour", "", *(f"{3600 / each:,.0f}" for each in steps)])
    return Table(title, ["", "fits", *headings(record)], rows)


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
