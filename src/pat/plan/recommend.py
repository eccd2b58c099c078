"""Recommends one of the shapes of a plan, and gives the reason and the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from shlex import quote
from typing import Any

from pat.plan.curves import Measured, Point, named
from pat.plan.guide import MEASURED_CUTS
from pat.plan.options import PlanOptions
from pat.plan.target import named_target
from pat.report import numbers
from pat.shape import AXES, DEFAULT_PRUNING_RATIO, LARGE_RATIO, TARGETS, ShapeOptions, asked_sizes

SMALL_RATIO = 0.15
"""A cut of up to about an eighth is recommended as it is, and for a larger one the line says to begin with less:
on stories260K an eighth cost half of what a quarter did (`MEASURED_CUTS`)."""

FIRST_RATIO = 0.125
"""Pruning ratio that the advice and the printed command recommend where the size is left open."""

CUT_MORE = (
    "cut more once its loss on held-out rows is below the base's by more than the standard error of the difference, "
    "and its loss on general text has not risen much"
)
"""Condition for cutting more. General text is part of it because held-out rows do not show what fine-tuning forgets."""


def recommend(options: PlanOptions, ratios: Sequence[float], measured: Measured | None) -> str:
    """Return what to do, by what the plan knows: losses that were measured here, or else those of other models.

    Args:
        options: of the plan.
        ratios: shares of the parameters that its candidates cut, in their order.
        measured: curves and shapes measured on data; None where none was given.
    """
    if measured is not None and measured.candidates:
        return _of_measured(options, measured)
    return _of_other_models(options, ratios)


def _of_other_models(options: PlanOptions, ratios: Sequence[float]) -> str:
    """Return what the losses of other models speak for: to begin with little, where the size is left open."""
    known = MEASURED_CUTS[-1]
    evidence = (
        f"Training has to make up for the cut: with {100 * known.pruning_ratio:.0f} % of its parameters cut, "
        f"{known.model} was still {known.above_base:.3f} nats per token above its untuned base after "
        f"{known.num_tokens:,} tokens; yours is not measured."
    )
    smallest = min(range(len(ratios)), key=lambda index: ratios[index])
    share, is_small = f"{100 * ratios[smallest]:.1f} %", ratios[smallest] <= SMALL_RATIO
    evidence += _caution(ratios[smallest])
    command = _command(options, None, _flags(options, smallest))
    first = CUT_MORE
    if targets := [f"--{name} {value}" for name, value in named_target(options).items()]:
        what = f"the shape that {targets[0]} asks for, {share} cut"
    elif len(ratios) > 1:
        what = f"the smallest of these cuts, {share}; {first}"
    elif _leaves_size_open(options):
        what = (
            f"an eighth to begin with, --pruning_ratio {FIRST_RATIO}; {first}. The tables below are for the default, "
            f"{share} cut, which `pat tune` takes without a ratio"
        )
    elif is_small:
        what = f"this shape, {share} cut"
    else:
        sizes = [f"--{AXES[axis].option} {size}" for axis, size in asked_sizes(options).items()]
        instead = f" instead of {' and '.join(sizes)}" if sizes else ""
        what = (
            f"this shape, {share} cut, which the command asks for, if you need a model of this size; else begin with "
            f"an eighth, --pruning_ratio {FIRST_RATIO}{instead}, and {first}"
        )
    return f"Recommended: {what}. {evidence}\n{command}"


def _of_measured(options: PlanOptions, measured: Measured) -> str:
    """Return what the losses on the data speak for: the default, where the data do not tell it from the best."""
    taken = measured.candidates[0]
    why = f"the least loss before training, {_above(taken, measured)}"
    if measured.num_steps:
        why = f"the least loss after {measured.num_steps:,} steps, {numbers.loss(taken.tuned_nll)}"
    else:
        for point in measured.candidates[1:]:
            if point.sizes == measured.default and not numbers.is_told_apart(point.nll - taken.nll, point.best_error):
                why = (
                    f"the default's shape, which {measured.num_scored_tokens:,} tokens do not tell from the best one "
                    f"before training, {_above(point, measured)}"
                )
                taken = point
                break
        why += "; what is best before training need not be best after it, which --shape_search_steps N tries"
    command = _command(options, options.calibrate, taken.options())
    return f"Recommended: {named(taken)}: {why}.{_caution(taken.pruning_ratio)}\n{command}"


def _caution(pruning_ratio: float) -> str:
    """Return what `pat tune` will warn of as well, so that no command is recommended without it."""
    if pruning_ratio <= LARGE_RATIO:
        return ""
    share = f"{100 * pruning_ratio:.0f} %"
    return f" A cut of {share} of the parameters is more than has been shown to work; expect a much worse model."


def _above(point: Point, measured: Measured) -> str:
    return f"{numbers.difference(point.nll - measured.base_nll, point.difference_error)} against the base's"


def _flags(options: PlanOptions, index: int) -> str:
    """Return the flags of `pat tune` that ask for one of the shapes of a plan."""
    found: dict[str, Any] = {"pruning_ratio": options.pruning_ratio[index]} if options.pruning_ratio else {}
    defaults = ShapeOptions()
    for option in fields(ShapeOptions):
        value = getattr(options, option.name)
        if option.name not in found and value != getattr(defaults, option.name):
            found[option.name] = value
    if not found.keys() & {"pruning_ratio", *TARGETS, *(axis.option for axis in AXES.values())}:
        found["pruning_ratio"] = FIRST_RATIO if _leaves_size_open(options) else DEFAULT_PRUNING_RATIO
    if options.vocabulary_size is not None:
        found["vocabulary_size"] = options.vocabulary_size
    return " ".join(f"--{name} {_written(value)}" for name, value in found.items())


def _leaves_size_open(options: PlanOptions) -> bool:
    """Tell whether nothing says how much to cut; a trimmed vocabulary alone may come to more than an eighth."""
    return not (options.pruning_ratio or named_target(options) or asked_sizes(options) or options.vocabulary_size)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else quote(str(value))


def _command(options: PlanOptions, dataset: str | None, flags: str) -> str:
    name, data = quote(options.model_name_or_path), "DATA" if dataset is None else quote(dataset)
    return f"pat tune --model_name_or_path {name} --dataset_name {data} {flags} --output_dir out"
