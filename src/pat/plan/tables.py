"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pat.families import FAMILIES
from pat.file_sizes.predict import GGUF_TYPES
from pat.plan.command import PlanRecord
from pat.plan.curves import print_measured
from pat.plan.guide import NOT_MEASURED
from pat.plan.headings import headings, sizes_of
from pat.plan.training_tables import print_training
from pat.report import numbers
from pat.report.table import Table
from pat.surgery.costs import GROUPS, ModelCost
from pat.widths import alignment

_ROTATIONS = {
    "pca": "PCA, exact in this family",
    "none": "none, because this family has norms between its writers and the residual stream",
    "open": "PCA among the channels whose final gain lies near its median, because the model is tied; only the weights "
    "can tell how many these are, and whether they are enough for this width",
}


def print_plan(record: PlanRecord) -> None:
    """Print a plan on standard output: which shape to take and the command for it, then what that follows from."""
    print(
        f"{record.model_name_or_path} ({record.model_type}, {record.dtype}), hidden size {record.base.hidden_size}.\n"
    )
    print(f"{record.recommendation}\n")
    for candidate in record.candidates:
        nearby = ", ".join(map(_describe_width, candidate.nearby_widths))
        legal = f" Legal widths nearby: {nearby}." if nearby else ""
        print(f"{candidate.shape.describe()}: {candidate.shape.reason}.{legal}")
    if record.candidates[-1].shape.cuts("hidden"):
        print(f"Rotation: {_ROTATIONS[record.rotation]}.")
    print()
    for table in (_sizes(record), _files(record), _running(record)):
        table.print()
    print_training(record)
    _guide(record).print()
    if record.measured is not None:
        print_measured(record.measured)
    print("\nNotes")
    for note in (*record.notes, *_odd(record), *_not_measured()):
        print(f"- {note}")


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
    return Table("Parameters", ["part", *headings(record)], rows, num_totals=3)


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
    return Table("File sizes (and their change)", ["stored as", *headings(record)], [r for r in rows if any(r[1:])])


def _odd(record: PlanRecord) -> Iterator[str]:
    """Yield a note for each reason why a quantised file is larger, or slower, than its number of bits promises."""
    files = [record.base_files, *(candidate.files for candidate in record.candidates)]
    names = ["base", *(sizes_of(candidate.shape) for candidate in record.candidates)]

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
    return Table(title, ["work or memory", *headings(record)], rows)


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
        "What cutting MLP channels has cost elsewhere: loss on held-out rows after training, in nats per token above "
        "(+) that of LoRA on the whole model, and that of the untuned base"
    )
    return Table(title, ("model", "cut", "tokens", "against LoRA", "against base", "runs"), rows)


def _not_measured() -> Iterator[str]:
    for model, ratio, known in NOT_MEASURED:
        yield f"What a cut of {ratio:.1%} costs {model} beside LoRA has not been measured; {known}."


def _costs(record: PlanRecord) -> list[ModelCost]:
    return [record.base, *(candidate.cost for candidate in record.candidates)]


def _describe_width(width: int) -> str:
    best = alignment(width)
    return f"{width} (multiple of {best})" if best > 1 else str(width)
