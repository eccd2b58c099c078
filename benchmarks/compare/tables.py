"""The tables of a comparison, in Markdown, in the order of the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare.config import CompareConfig
from compare.methods import Order
from compare.summary import Line, Spread
from pat.report.table import Table

_ORDERS: dict[Order, str] = {
    "FT": "tuned alone",
    "P→FT": "pruned, then tuned",
    "FT→P": "LoRA's tuned model, then pruned",
    "PAT": "pruned while it is tuned",
}


def markdown(config: CompareConfig, lines: Sequence[Line], num_missing: int = 0) -> str:
    """Return the whole report.

    Args:
        config: of the comparison.
        lines: of `summarise`.
        num_missing: results that are not there, of `num_missing`.
    """
    parts = ["# Comparison", _preface(config, lines, num_missing)]
    for model in dict.fromkeys(line.model for line in lines):
        own = [line for line in lines if line.model == model]
        parts += [f"## {model}", _main_table(config, own)]
        for protocol in own[0].tasks if own else ():
            parts += [f"### {model}: accuracy by task, {protocol} (%)", _task_table(own, protocol)]
        parts += [f"### {model}: budgets", _budget_table(config, own)]
    return "\n\n".join(parts) + "\n"


def _preface(config: CompareConfig, lines: Sequence[Line], num_missing: int) -> str:
    length = f"{config.steps} steps" if config.steps is not None else f"{config.epochs:g} epochs"
    rows = config.batch_size * config.gradient_accumulation_steps
    machines = dict.fromkeys(machine for line in lines for machine in line.machines if machine)
    text = (
        f"Every method trains {length} of {rows} rows of at most {config.max_length} tokens, the same rows in the same "
        f"order; {_search(config)} LoRA's product has the same scale everywhere. As many parameters are trained as by "
        "LoRA on the whole model, as closely as a rank comes to it (PAT, where it compacts: on the small model). "
        f"{_seeds(config)} The ratio is the share of the hidden size that PAT is told to cut "
        "(the budgets below show to which width); every other method is cut to the number of parameters that PAT then "
        "has, as closely as it can. Weights are rounded to the dtype of the base's checkpoint before anything is "
        f"measured. NLL: nats per held-out response token of the base{_tokens(config, lines)}."
    )
    if config.tasks is not None:
        some = "" if config.limit is None else f", {config.limit} evenly spaced questions of each"
        text += f" Accuracy: unweighted mean over the tasks{some}."
        errors: dict[str, float] = {}
        for line in lines:
            for protocol, error in line.sampling_error.items():
                errors[protocol] = max(error, errors.get(protocol, 0.0))
        if errors:
            each = ", ".join(f"{100 * error:.1f} ({protocol})" for protocol, error in errors.items())
            text += f" Its standard error from the number of questions alone is at most, in points: {each}."
    if num_missing:
        text += f" **Missing cells: {num_missing}.**"
    text += _edges(config, lines) + _outdated(lines)
    if any(line.name.startswith("pat") for line in lines):
        text += (
            " The defaults of PAT's own recipe were chosen beforehand, by runs on SmolLM2 with 25 % cut and rows of "
            "instruct_21k; should this be the same data, some of the rows reported may have been held out there, too "
            "(each with a chance of one in two hundred)."
        )
    if any(line.method.of_paper for line in lines):
        text += f" In the paper's recipe the mask learns {config.mask_lr_multiplier:g} times as fast as the adapters."
    if machines:
        text += f"\n\nMeasured on: {'; and on '.join(machines)}."
    return text


def _edges(config: CompareConfig, lines: Sequence[Line]) -> str:
    """Name the methods for which a rate outside those tried may be better."""
    names = dict.fromkeys(line.method.name_with_order for line in lines if _is_at_the_edge(config, line))
    return f" The rate chosen was the highest or lowest that was tried for: {', '.join(names)}." if names else ""


def _is_at_the_edge(config: CompareConfig, line: Line) -> bool:
    rates = config.learning_rates
    return len(rates) > 1 and line.learning_rate in (min(rates), max(rates))


def _outdated(lines: Sequence[Line]) -> str:
    """Name the methods that were others when their cells were run."""
    old: dict[str, list[str]] = {}
    for line in lines:
        for reason in line.outdated:
            if (name := line.method.name_with_order) not in old.setdefault(reason, []):
                old[reason].append(name)
    named = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in old.items())
    return f" **Not run with today's defaults and version of the method: {named}.**" if old else ""


def _tokens(config: CompareConfig, lines: Sequence[Line]) -> str:
    counts = {line.model: line.facts.get("num_held_out_tokens") for line in reversed(lines)}
    known = [f"{model} {count:,}" for model, count in reversed(counts.items()) if count is not None]
    return f" ({', '.join(known)}; {config.held_out:,} rows)" if known else ""


def _seeds(config: CompareConfig) -> str:
    if len(config.seeds) == 1:
        return f"One seed, {config.seeds[0]}."
    return f"Seeds {', '.join(map(str, config.seeds))}, mean ± standard deviation."


def _search(config: CompareConfig) -> str:
    rates = ", ".join(f"{rate:g}" for rate in sorted(config.learning_rates))
    if len(config.learning_rates) == 1:
        return f"at the learning rate {rates}."
    length = ""
    if config.search_steps is not None and config.search_steps != config.steps:
        length = f" after {config.search_steps} steps"
    return (
        f"learning rate of each from {rates} by the validation loss{length}, with the first seed at "
        f"{config.ablation_ratio:.1%}."
    )


def _main_table(config: CompareConfig, lines: Sequence[Line]) -> str:
    protocols = list(lines[0].accuracy) if lines else []
    head = ["Ratio", "Method", "Order", "Parameters", "NLL", *(f"Accuracy, {protocol} (%)" for protocol in protocols)]
    whole = next((line.num_parameters.mean for line in lines if line.ratio == 0 and line.num_parameters), None)
    body = []
    for line in lines:
        mark = " ¹" if line.name in config.ablations and line.name not in config.methods else ""
        body.append(
            [
                f"{line.ratio:.1%}" if line.method.prunes else "0",
                line.method.label + mark,
                line.method.order or "none",
                _show_size(line, whole),
                _show_nll(config, line),
                *(_show(line.accuracy.get(protocol), 2, 100) for protocol in protocols),
            ]
        )
    notes = ["¹ At this ratio alone."] if any("¹" in row[1] for row in body) else []
    notes += [
        f"{order}: {meaning}." for order, meaning in _ORDERS.items() if order in {line.method.order for line in lines}
    ]
    return "\n\n".join([_table(head, body), " ".join(notes)]).rstrip()


def _task_table(lines: Sequence[Line], protocol: str) -> str:
    tasks = list(lines[0].tasks[protocol])
    body = [
        [f"{line.ratio:.1%}" if line.method.prunes else "0", line.method.label, line.method.order or "none"]
        + [_show(line.tasks.get(protocol, {}).get(task), 1, 100, with_deviation=False) for task in tasks]
        for line in lines
    ]
    return _table(["Ratio", "Method", "Order", *tasks], body)


def _budget_table(config: CompareConfig, lines: Sequence[Line]) -> str:
    body = []
    counts = any("train_flops" in line.facts for line in lines)
    for line in lines:
        facts = line.facts
        width = facts.get("pruned_hidden_size")
        body.append(
            [
                f"{line.ratio:.1%}" if line.method.prunes else "0",
                line.method.label,
                line.method.order or "none",
                "" if width is None else f"{facts['hidden_size']} → {width}",
                _show_rate(config, line),
                str(facts.get("rank", "")),
                _show_trained(facts),
                f"{facts['tune_seconds']:.0f}" if "tune_seconds" in facts else "",
                *([_show_cost(facts)] if counts else []),
                str(facts.get("pruning", "")),
            ]
        )
    head = ["Ratio", "Method", "Order", "Hidden size (PAT's)", "Learning rate"]
    head += [
        "Rank",
        "Trained (share of LoRA's)",
        "Tuning (s) ¹",
        *(["Tokens, FLOPs of tuning"] if counts else []),
        "How it was cut",
    ]
    note = "¹ Of the first seed, on a machine that may have done other things: no measurement of speed."
    if any("⁺" in row[4] for row in body):
        note += " ⁺ The highest or lowest rate that was tried."
    return f"{_table(head, body)}\n\n{note}"


def _show_size(line: Line, whole: float | None) -> str:
    if line.num_parameters is None:
        return ""
    size = line.num_parameters.mean
    return f"{size / 1e6:,.3f} M" + ("" if whole is None else f" ({size / whole:.1%})")


def _show_nll(config: CompareConfig, line: Line) -> str:
    """Say beside the mean what it leaves out."""
    num_seeds = len(config.seeds) if line.method.order else 1
    found = line.num_seeds + line.num_diverged
    notes = [f"{line.num_diverged} of {found} diverged"] if line.num_diverged else []
    notes += [f"{found} of {num_seeds} seeds"] if found < num_seeds else []
    return f"{_show(line.nll, 3)} ({', '.join(notes)})".strip() if notes else _show(line.nll, 3)


def _show_rate(config: CompareConfig, line: Line) -> str:
    if not line.learning_rate:
        return ""
    return f"{line.learning_rate:g}" + (" ⁺" if _is_at_the_edge(config, line) else "")


def _show_trained(facts: Mapping[str, Any]) -> str:
    if "num_trainable" not in facts:
        return ""
    share = f" ({facts['num_trainable'] / facts['trainable_budget']:.1%})" if "trainable_budget" in facts else ""
    return f"{facts['num_trainable'] / 1e6:.3f} M{share}"


def _show_cost(facts: Mapping[str, Any]) -> str:
    return f"{facts['train_tokens']:,}, {facts['train_flops']:.3g}" if "train_flops" in facts else ""


def _show(spread: Spread | None, digits: int, factor: float = 1, *, with_deviation: bool = True) -> str:
    if spread is None:
        return ""
    text = f"{spread.mean * factor:.{digits}f}"
    if spread.deviation is None or not with_deviation:
        return text
    return f"{text} ± {spread.deviation * factor:.{digits}f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return Table("", head, body, num_text_columns=len(head)).to_markdown()
