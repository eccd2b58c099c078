"""The report of a run of `pat tune` as one HTML file, made of its record. Nothing in the file asks for another one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pat.paths import head_holds
from pat.report import numbers
from pat.report.facts import Facts, as_number
from pat.report.pictures import axes_cut, energy_picture, figure_pictures, gate_pictures, training_pictures
from pat.report.usage import LOAD, plain_way, ways_to_ask
from pat.shape import missed_ratio

STAGES = {"base": "base", "tuned": "tuned", "dense": "written"}
"""Names of the models of a run in reports and on the live line."""

_DATA = {
    "num_rows": "rows of the source",
    "num_examples": "examples to train on",
    "num_tokens": "tokens of these examples, before any is cut off",
    "num_target_tokens": "tokens of these that are to be learned",
    "num_held_out": "examples held out for the figures",
    "num_dropped": "rows left out, because they have no response",
    "num_held_out_dropped": "held-out rows left out, because they have no response",
    "num_truncated": "examples that lose the end of what is to be learned",
    "num_cut_tokens": "tokens cut off at the greatest length",
    "num_cut_target_tokens": "tokens of these that were to be learned",
    "num_cut_away": "examples with nothing left to learn",
    "num_unlearned_openings": "rows that open with an answer, which is read and not learned",
}

_FOLDERS = re.compile(r"(?<![\w.:/<])(?:/|~/|[A-Za-z]:\\)(?:[\w.@+-]+[/\\])+(?=[\w.@+-])")

_HEAD = 2**16
"""Bytes of a page that hold its head, with a title that may be long."""

_MARKS = (b'<meta name="generator" content="pat report">', b": report of pat tune</title>")
"""Texts by which the head of a report is recognised; reports of earlier versions have the second one alone."""


@dataclass(frozen=True)
class Changed:
    """An option that has another value than the recipe's default."""

    name: str
    default: str
    value: str


def is_report(path: Path) -> bool:
    """Tell whether a file can be read and is a page that `render_report` has made, now or in an earlier version."""
    return head_holds(path, _MARKS, _HEAD)


def render_report(record: Mapping[str, Any], changed: Sequence[Changed] | None) -> str:
    """Return the report of a record of `pat tune`.

    Args:
        record: the content of `results.json`. Whatever it lacks is left out, and the report says so; every text in it
            is escaped.
        changed: the options that are not the recipe's defaults; None where they are not known.
    """
    facts = Facts(record)
    folder = _without_folders(facts.text("training_arguments", "output_dir") or "out").replace("\\", "/")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        resources.files("pat.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        name=facts.text("model_name_or_path") or "a model without a name",
        headline=_headline(facts),
        figures=_figures(facts),
        figure_pictures=figure_pictures(facts, STAGES),
        num_held_out_tokens=numbers.count(facts.number("figures", "dense", "num_held_out_tokens")),
        general=_general(facts),
        makes_small_first=facts.number("cut", "milestone_step") == 0 and bool(facts.mapping("compaction")),
        axes=axes_cut(facts),
        asked=_asked(facts),
        training=_training(facts),
        training_pictures=training_pictures(facts),
        gate_pictures=gate_pictures(facts),
        rotation=facts.text("cut", "rotation"),
        energy=energy_picture(facts),
        parity=_parity(Facts(facts.mapping("parity")), "The written model", "the tuned one"),
        milestone_parity=_parity(
            Facts(facts.mapping("compaction", "parity")), "At the milestone the small model", "the masked one"
        ),
        samples=_samples(facts),
        data=[
            (label, numbers.count(facts.number("data", key)), facts.number("data", key)) for key, label in _DATA.items()
        ],
        data_name=facts.text("dataset"),
        data_format=facts.text("data", "format"),
        prompt_format=facts.text("prompt_format"),
        unused_columns=[str(name) for name in facts.items("data", "unused_columns")],
        warnings=[_without_folders(str(line)) for line in facts.items("warnings")],
        has_warnings="warnings" in record,
        teacher=_teacher(facts),
        knows_teacher="teacher" in record,
        changed=None
        if changed is None
        else [(row.name, _without_folders(row.default), _without_folders(row.value)) for row in changed],
        recipe=facts.text("recipe"),
        versions={str(key): str(value) for key, value in sorted(facts.mapping("versions").items())},
        load=LOAD.format(folder=json.dumps(f"{folder}/model", ensure_ascii=False)),
        ways=ways_to_ask(facts.text("prompt_format")) or [plain_way()],
        paired=facts.number("figures", "dense", "held_out_difference_error") is not None,
        cuts_hidden=(facts.number("cut", "pruned_hidden_size") or 0) < (facts.number("cut", "hidden_size") or 0),
    )


def _headline(facts: Facts) -> str:
    """Say in plain words what has become smaller, and what it costs."""
    before, after = (facts.number("figures", stage, "num_parameters") for stage in ("base", "dense"))
    name = facts.text("model_name_or_path") or "the base"
    if not before or after is None:
        said = f"The record does not say how much smaller than {name} the written model is"
    else:
        said = (
            f"The written model has {abs(1 - after / before):.1%} {'fewer' if after <= before else 'more'} parameters "
            f"than {name} ({numbers.count(after)} instead of {numbers.count(before)})"
        ).replace("%", " %")
    base, dense = (facts.number("figures", stage, "held_out_nll") for stage in ("base", "dense"))
    if base is None or dense is None:
        return f"{said}. What that costs is not known, because no rows were held out."
    distance = dense - base
    if not round(distance, 3):
        same = f"{said}, and its held-out loss is that of the untuned base, {numbers.loss(dense)} nats per token."
        return same + _forgotten(facts)
    error = facts.number("figures", "dense", "held_out_difference_error")
    doubt = "" if error is None or numbers.is_told_apart(distance, error) else "; the two are not told apart"
    return (
        f"{said}, and its held-out loss is {numbers.loss(dense)} nats per token, {numbers.loss(abs(distance), error)} "
        f"{'below' if distance < 0 else 'above'} that of the untuned base ({numbers.loss(base)}){doubt}."
        f"{_forgotten(facts)}"
    )


def _asked(facts: Facts) -> str | None:
    """Say that another share of the parameters was cut than was asked for, where a trimmed vocabulary has no part."""
    before, after = (facts.number("cut", name) for name in ("num_parameters_base", "num_parameters"))
    request = facts.mapping("pat_config")
    if not request or not before or after is None:
        return None
    vocabulary, trimmed = facts.number("cut", "vocab_size"), facts.number("cut", "pruned_vocab_size")
    if vocabulary is not None and trimmed is not None and trimmed < vocabulary:
        return None
    share, ratio = 1 - after / before, facts.number("pat_config", "pruning_ratio")
    if (asked := missed_ratio({**request, "pruning_ratio": ratio}, share)) is None:
        return None
    return (
        f"{100 * share:.1f} % of the parameters were cut where {100 * asked:.1f} % were asked for, since sizes have to "
        "be such as the architecture allows and hardware runs well."
    )


def _forgotten(facts: Facts) -> str:
    """Say what became of the loss on general text, where it was measured."""
    base, dense = (facts.number("figures", stage, "general_nll") for stage in ("base", "dense"))
    if base is None or dense is None:
        return ""
    shown = f"it has {numbers.loss(dense)}, the base {numbers.loss(base)}"
    return f" On general text, which shows what was forgotten, {shown}."


def _figures(facts: Facts) -> list[tuple[str, ...]]:
    """Return the rows of the table of models."""
    rows: list[tuple[str, ...]] = []
    for stage, label in STAGES.items():
        model = Facts(facts.mapping("figures", stage))
        nll = numbers.loss(model.number("held_out_nll"), model.number("held_out_standard_error"))
        sizes = numbers.count(model.number("num_parameters")), numbers.size(model.number("num_bytes"))
        general = numbers.loss(model.number("general_nll"), model.number("general_standard_error"))
        rows.append((label, *sizes, nll, general, numbers.flops(model.number("flops_per_token"))))
    return rows if facts.mapping("figures") else []


def _general(facts: Facts) -> str | None:
    """Say on which text the models were measured besides, and what that shows."""
    name, num_tokens = facts.text("general_text"), facts.number("figures", "dense", "num_general_tokens")
    if name is None or not num_tokens:
        return None
    text = "four pages that come with PAT" if "/" in name else name  # of a file the last component is known alone
    return (
        f"General text is {text} ({numbers.count(num_tokens)} tokens), which has nothing to do with the training data: "
        "a loss above the base's is what the small model has forgotten"
    )


def _training(facts: Facts) -> list[tuple[str, str]]:
    """Return what is known of the training in words and numbers."""
    rates = ((name, as_number(rate)) for name, rate in facts.mapping("learning_rates").items())
    milestone, seconds = facts.number("cut", "milestone_step"), facts.number("timings", "train_seconds")
    timed = None if seconds is None else f"{numbers.count(seconds)} (other work on the machine changes them)"
    rows = [
        ("recipe", facts.text("recipe")),
        ("optimizer steps", facts.number("num_steps")),
        ("step of the milestone", milestone),
        ("tokens seen", facts.number("num_tokens_seen")),
        ("highest learning rates", ", ".join(f"{name} {rate:g}" for name, rate in rates if rate is not None) or None),
        ("seed", facts.text("seed") or facts.number("seed")),
        ("device", facts.text("device")),
        ("machine", facts.text("machine", "device")),
        ("number format", _arithmetic(facts)),
        ("seconds of choosing, cutting and training", timed),
    ]
    return [
        (label, value if isinstance(value, str) else numbers.count(value)) for label, value in rows if value is not None
    ]


def _arithmetic(facts: Facts) -> str | None:
    if (dtype := facts.text("dtype")) is None:
        return None
    bf16, fp16 = (facts("training_arguments", name) is True for name in ("bf16", "fp16"))
    return numbers.arithmetic(dtype, bf16=bf16, fp16=fp16)


def _parity(parity: Facts, this: str, other: str) -> str | None:
    """Say in words how far two forms of one model are apart."""
    same, places = parity.number("top1_agreement"), parity.number("num_tokens")
    largest, floor = parity.number("max_abs_logit_diff"), parity.number("permutation_floor")
    if same is None or places is None or largest is None:
        return None
    said = (
        f"{this} gives the same next token as {other} in {100 * same:.2f} % of {numbers.count(places)} places; the "
        f"largest difference of a logit is {numbers.deviation(largest)}"
    )
    if (spread := parity.number("logit_std")) is not None:
        said += f", where logits have a standard deviation of {spread:.2f}"
    if (kind := parity.text("dtype")) is not None:
        said += f" (in {kind})"
    if floor is not None:
        said += (
            f". Rounding alone explains {numbers.deviation(floor)} of that: so much comes of merely permuting the "
            "model's channels"
        )
    return said + "."


def _samples(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each prompt with its answers and who gave them; records of older versions lack that of the data."""
    rows = [Facts(row) for row in facts.items("samples") if isinstance(row, Mapping)]
    whose = {"reference": "the data", "base": "base", "small": "written"}
    return [
        (
            row.text("prompt") or "",
            [(who, row.text(name) or "") for name, who in whose.items() if name != "reference" or row.text(name)],
        )
        for row in rows
    ]


def _teacher(facts: Facts) -> str | None:
    name, weight = facts.text("teacher", "name"), facts.number("teacher", "weight")
    if name is None:
        return None
    said = f"In stage two the small model has learnt from {name} as well"
    if weight is not None:
        said += f"; the divergence from it was {weight:g} of the loss"
    if (top_k := facts.number("teacher", "top_k")) is not None:
        said += f", over its {numbers.count(top_k)} likeliest tokens"
    return said + "."


def _without_folders(text: str) -> str:
    """Return a text with the last component alone of every absolute path: a report tells nobody's folders."""
    return _FOLDERS.sub("", text)
