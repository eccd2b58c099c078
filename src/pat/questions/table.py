"""The 14 tasks of the paper: their names, and the dataset of the hub behind each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pat.errors import PatError
from pat.questions import hub


@dataclass(frozen=True)
class EvalTask:
    """One task: where its questions come from when there is no local file."""

    name: str
    title: str
    """As the paper's tables head its column."""
    convert: Callable[[Mapping[str, Any]], hub.Row | None]
    path: str
    """Dataset id on the hub."""
    config: str | None = None
    split: str = "validation"
    """The split that is asked: the one with public answers."""
    train_split: str = "train"


SUPER_GLUE = "aps/super_glue"

TASKS: dict[str, EvalTask] = {
    task.name: task
    for task in (
        EvalTask("arc_challenge", "ARC-C", hub.arc, "allenai/ai2_arc", "ARC-Challenge"),
        EvalTask("arc_easy", "ARC-E", hub.arc, "allenai/ai2_arc", "ARC-Easy"),
        EvalTask("boolq", "BoolQ", hub.boolq, SUPER_GLUE, "boolq"),
        EvalTask("copa", "COPA", hub.copa, SUPER_GLUE, "copa"),
        EvalTask("hellaswag", "HellaSwag", hub.hellaswag, "Rowan/hellaswag"),
        EvalTask("mmlu", "MMLU", hub.mmlu, "cais/mmlu", "all", "test", "auxiliary_train"),
        EvalTask("multirc", "MultiRC", hub.multirc, SUPER_GLUE, "multirc"),
        EvalTask("openbookqa", "OpenBookQA", hub.openbookqa, "allenai/openbookqa", "additional", "test"),
        EvalTask("piqa", "PIQA", hub.piqa, "baber/piqa"),
        EvalTask("rte", "RTE", hub.rte, SUPER_GLUE, "rte"),
        EvalTask("siqa", "SIQA", hub.siqa, "lighteval/siqa"),
        EvalTask("wic", "WiC", hub.wic, SUPER_GLUE, "wic"),
        EvalTask("winogrande", "WinoGrande", hub.winogrande, "allenai/winogrande", "winogrande_xl"),
        EvalTask("wsc", "WSC", hub.wsc, SUPER_GLUE, "wsc.fixed"),
    )
}

PAPER = "paper"
"""Name of the whole set."""


def resolve_tasks(names: str | Sequence[str]) -> list[EvalTask]:
    """Return the tasks of a list of names, or of names separated by commas; `paper` stands for all 14.

    Raises:
        PatError: a name that is not a task, or none at all.
    """
    given = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    unknown = [name for name in given if name != PAPER and name not in TASKS]
    if unknown or not given:
        what = f"the unknown task(s) {', '.join(map(repr, unknown))}" if unknown else "no task"
        raise PatError(f"Got {what}; expected {PAPER} (all 14) or some of {', '.join(TASKS)}.")
    chosen = dict.fromkeys(name for item in given for name in (TASKS if item == PAPER else (item,)))
    return [TASKS[name] for name in chosen]
