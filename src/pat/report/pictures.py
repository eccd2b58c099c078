"""The drawings of a run's report, each with the words beneath it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from pat.report import numbers
from pat.report.facts import Facts
from pat.report.svg import Bar, Line, bars, lines, thinned
from pat.shape import AXES

_ACTIVE = {
    "hidden": "pat/active_channels",
    "mlp": "pat/active_mlp_channels",
    "heads": "pat/active_key_value_heads",
    "layers": "pat/active_layers",
}
"""Names under which `PatCallback` logs the active entries."""

_FIGURES = (
    (("num_parameters",), "Parameters", numbers.count),
    (("num_bytes",), "Bytes of the weights", numbers.size),
    (("gguf_bytes", "Q8_0"), "Quantised file for llama.cpp, Q8_0 (predicted)", numbers.size),
    (("gguf_bytes", "Q4_K_M"), "Quantised file for llama.cpp, Q4_K_M (predicted)", numbers.size),
    (("held_out_nll",), "Held-out loss, nats per token", numbers.loss),
    (("general_nll",), "Loss on general text, nats per token", numbers.loss),
    (("flops_per_token",), "FLOPs to read a token", numbers.flops),
)


@dataclass(frozen=True)
class Picture:
    """A drawing, its heading and a remark."""

    title: str
    drawing: Markup
    remark: str = ""


@dataclass(frozen=True)
class Size:
    """The size of an axis before and after the cut."""

    label: str
    before: float
    after: float
    kind: str


def figure_pictures(facts: Facts, stages: Mapping[str, str]) -> list[Picture]:
    """Draw the models of a run side by side, one drawing for each figure."""
    pictures = []
    for keys, title, show in _FIGURES:
        rows = []
        for stage, label in stages.items():
            value = facts.number("figures", stage, *keys)
            if value is not None:
                of_loss = keys[0].replace("_nll", "_standard_error")
                error = facts.number("figures", stage, of_loss) if of_loss != keys[0] else None
                text = show(value) if error is None else numbers.loss(value, error)
                rows.append(Bar(label, value, text, stage, error))
        if rows:
            pictures.append(Picture(title, bars(title, rows)))
    return pictures


def sizes(facts: Facts) -> list[Size]:
    """Return every axis whose size is known, cut or not, and the vocabulary."""
    found = []
    parts = [(name, axis.label, axis.field, axis.option) for name, axis in AXES.items()]
    for kind, label, field, option in (*parts, ("vocabulary", "vocabulary", "vocab_size", "pruned_vocab_size")):
        before = facts.number("cut", field) or facts.number("pat_config", "base_shape", field)
        if before is not None and before > 0:
            after = facts.number("cut", option)
            found.append(Size(label, before, before if after is None else after, kind))
    return found


def axes_cut(facts: Facts) -> Picture | None:
    """Draw what was cut: the base's size as an outline, filled as far as the written model's goes."""
    rows = []
    for size in sizes(facts):
        text = f"{numbers.count(size.before)}, not cut"
        if size.after < size.before:
            change = numbers.change(size.before, size.after)
            text = f"{numbers.count(size.before)} → {numbers.count(size.after)} ({change})"
        rows.append(Bar(size.label, size.after, text, size.kind, whole=size.before))
    if not rows:
        return None
    return Picture("Sizes before and after", bars("Sizes before and after", rows), "The outline is the base's size.")


def training_pictures(facts: Facts) -> list[Picture]:
    """Draw losses and the learning rate over the steps."""
    last, mark, pictures = facts.number("num_steps") or 0.0, _milestone(facts), []
    series, remark = [], ""
    for key, label, kind in (("loss", "training rows", "tuned"), ("eval_loss", "evaluation", "evaluated")):
        if points := facts.series(key):
            few, group = thinned(points)
            series.append(Line(label, few, kind))
            remark += f"Each point of the {label} is the mean of {group} logged values. " * (group > 1)
    if series:
        drawing = lines(
            "Loss over the steps", series, y_label="nats per token", format_y=_short, last_step=last, mark=mark
        )
        pictures.append(Picture("Loss", drawing, remark))
    if points := facts.series("learning_rate"):
        few, _ = thinned(points)
        line = Line("learning rate", few, "base")
        drawing = lines(
            "Learning rate over the steps",
            [line],
            y_label="learning rate of LoRA",
            format_y=lambda rate: f"{rate:.2g}",
            last_step=last,
            mark=mark,
            from_zero=True,
        )
        pictures.append(Picture("Learning rate", drawing))
    return pictures


def gate_pictures(facts: Facts) -> list[Picture]:
    """Draw how many entries of each axis are active over the steps; past the milestone they are those that are kept."""
    known = {size.kind: size for size in sizes(facts)}
    last, milestone = facts.number("num_steps") or 0.0, facts.number("cut", "milestone_step")
    pictures = []
    for name, key in _ACTIVE.items():
        points = facts.series(key)
        if not points:
            continue
        few, _ = thinned(points)
        size, continued = known.get(name), []
        if size is not None and milestone is not None and few[-1][0] < last:
            continued = [few[-1], *((x, size.after) for x in (max(milestone, few[-1][0]), last))]
        title = f"Active {AXES[name].label}" + ("" if name in ("hidden", "layers") else ", mean over the layers")
        title = title.replace("hidden size", "channels of the residual stream")
        drawing = lines(
            title,
            [Line(title, few, name, continued)],
            y_label="active" if size is None else f"active, of {numbers.count(size.before)}",
            format_y=_short,
            last_step=last,
            mark=_milestone(facts),
            from_zero=True,
            up_to=None if size is None else size.before,
        )
        remark = "The dashed part is not logged: the model has exactly that size since the milestone." * bool(continued)
        pictures.append(Picture(title, drawing, remark))
    return pictures


def energy_picture(facts: Facts) -> Picture | None:
    """Draw which share of the residual stream's energy the kept channels hold in the PCA basis."""
    points = facts.series("pat/energy_kept")
    if not points or facts.text("cut", "rotation") in (None, "none"):
        return None
    kept = min(max(points[-1][1], 0.0), 1.0)
    row = Bar("kept", kept, f"{100 * kept:.1f} %", "hidden", whole=1.0)
    title = "Energy of the residual stream in the kept channels"
    return Picture(title, bars(title, [row]), f"{100 * (1 - kept):.1f} % lay in the directions that were cut.")


def _milestone(facts: Facts) -> tuple[float, str] | None:
    step = facts.number("cut", "milestone_step")
    return None if step is None or step <= 0 else (step, f"milestone, step {numbers.count(step)}")


def _short(number: float) -> str:
    """Return a number with as many digits as an axis needs."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
