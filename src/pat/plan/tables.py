"""A plan as tables for people, or as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pat.families import FAMILIES
from pat.plan.command import Plan
from pat.plan.costs import GROUPS, ModelCost, Size
from pat.shape import alignment

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def print_plan(plan: Plan, *, as_json: bool = False) -> None:
    """Print a plan on standard output."""
    if as_json:
        print(json.dumps(to_dict(plan), indent=2))
        return
    # Without highlighting and markup: numbers stay plain, and a path may hold brackets.
    console = Console(highlight=False, markup=False)
    console.print(
        f"{plan.model_name_or_path} ({plan.model_type}, {plan.dtype}): hidden size {plan.width.hidden_size} -> "
        f"{plan.width.pruned_hidden_size}, {plan.width.pruning_ratio:.1%} cut."
    )
    console.print(f"Why this width: {plan.width.reason}.")
    console.print(f"Legal widths nearby: {', '.join(map(_describe_width, plan.nearby_widths))}.")
    console.print(f"Rotation: {plan.rotation} (from the family alone; see `--rotation` of `pat tune`).\n")
    console.print(_sizes(plan))
    console.print(_costs(plan))
    console.print(_training(plan))
    for note in plan.notes:
        console.print(f"- {note}")


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan's facts and the figures derived from them, ready for JSON."""
    facts = asdict(plan)
    facts["width"]["pruning_ratio"] = plan.width.pruning_ratio
    for name, cost in (("base", plan.base), ("pruned", plan.pruned)):
        facts[name]["total"] = asdict(cost.total)
        facts[name]["inference_bytes"] = cost.inference_bytes
    facts["training"]["total_bytes"] = plan.training.total_bytes
    facts["training"]["checkpointed_total_bytes"] = plan.training.checkpointed_total_bytes
    return facts | {"prefill_speedup": plan.prefill_speedup, "decode_speedup": plan.decode_speedup}


def _sizes(plan: Plan) -> Table:
    table = _table("Parameters and bytes", "part", "base", "bytes", "pruned", "bytes", "change")
    for group in GROUPS:
        before, after = plan.base.groups[group], plan.pruned.groups[group]
        if before.num_parameters or after.num_parameters:
            table.add_row(_label(group, plan), *_size_cells(before, after))
    table.add_section()
    table.add_row("total", *_size_cells(plan.base.total, plan.pruned.total))
    return table


def _label(group: str, plan: Plan) -> str:
    if group == "embedding" and plan.base.tied and plan.pruned.tied:
        return "embedding and head, tied"
    if group == "MLP" and FAMILIES[plan.model_type].expert_parameters:
        return "MLP, experts"
    return group


def _size_cells(before: Size, after: Size) -> tuple[str, ...]:
    change = f"{after.num_parameters / before.num_parameters - 1:+.1%}" if before.num_parameters else "new"
    return (
        f"{before.num_parameters:,}",
        _bytes(before.num_bytes),
        f"{after.num_parameters:,}",
        _bytes(after.num_bytes),
        change,
    )


def _costs(plan: Plan) -> Table:
    table = _table(f"Running it, context of {plan.context} tokens", "quantity", "base", "pruned", "expected")

    def row(name: str, base: str, pruned: str, expected: str = "") -> None:
        table.add_row(name, base, pruned, expected)

    def of(name: str, field: str, unit: str, expected: str = "") -> None:
        row(name, _scaled(_get(plan.base, field), unit), _scaled(_get(plan.pruned, field), unit), expected)

    of("prefill, per token", "prefill_flops_per_token", "FLOP", f"{plan.prefill_speedup:.2f}x faster")
    of("decode, read per token", "decode_bytes_per_token", "B", f"{plan.decode_speedup:.2f}x faster")
    of("KV cache, one sequence", "kv_cache_bytes", "B")
    of("memory, weights and cache", "inference_bytes", "B")
    return table


def _training(plan: Plan) -> Table:
    memory = plan.training
    title = f"Memory for training, batches of {memory.batch_size} x {memory.length} tokens"
    table = _table(title, "purpose", "plain", "with gradient checkpointing")
    for name, size in (
        ("base, frozen", memory.base_bytes),
        (f"adapter, {memory.num_trainable_parameters:,} parameters", memory.adapter_bytes),
        ("gradients and optimizer", memory.optimizer_bytes),
    ):
        table.add_row(name, _bytes(size), _bytes(size))
    activations = (memory.activation_bytes, memory.checkpointed_activation_bytes)
    table.add_row("activations, estimate", *map(_bytes, activations))
    table.add_section()
    table.add_row("total", _bytes(memory.total_bytes), _bytes(memory.checkpointed_total_bytes))
    return table


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _describe_width(width: int) -> str:
    best = alignment(width)
    return f"{width} (multiple of {best})" if best > 1 else str(width)


def _get(cost: ModelCost, field: str) -> float:
    return float(getattr(cost, field))


def _bytes(amount: float) -> str:
    return _scaled(amount, "B")


def _scaled(amount: float, unit: str) -> str:
    for size, prefix in _UNITS:
        if amount >= size:
            scaled = amount / size
            return f"{scaled:.1f} {prefix}{unit}" if scaled >= 100 else f"{scaled:.2f} {prefix}{unit}"
    return f"{amount:,.0f} {unit}"
