"""Scores as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from pat.evaluation.tasks.scores import TaskEvaluation
from pat.questions.table import TASKS

HEADINGS = {
    ("letter", "acc"): "letter",
    ("likelihood", "acc"): "likelihood",
    ("likelihood", "acc_norm"): "per character",
}
"""What each metric is called; those that were not measured have no column."""


def score_table(evaluation: TaskEvaluation) -> Table:
    """Return accuracies in percent with their standard errors, a row a task, and their unweighted mean.

    Beside the accuracy by letter stands the share of the answers that hold no letter.
    """
    table = Table(caption="accuracy in %, ± standard error")
    table.add_column("task")
    table.add_column("questions", justify="right")
    columns = [key for key in HEADINGS if key[0] in evaluation.protocols]
    for key in columns:
        table.add_column(HEADINGS[key], justify="right")
    without = {score.task: score.num_without_letter for score in evaluation.scores if score.protocol == "letter"}
    if without:
        table.add_column("no letter", justify="right")
    tasks = evaluation.tasks
    for task in tasks:
        scores = {protocol: evaluation.get(task, protocol) for protocol in evaluation.protocols}
        cells = [
            _cell(getattr(scores[protocol], metric), getattr(scores[protocol], f"{metric}_stderr"))
            for protocol, metric in columns
        ]
        count = next(score.num_questions for score in scores.values() if score is not None)
        if without:
            number = without.get(task)
            cells.append("–" if number is None else f"{100 * number / count:.1f}")
        table.add_row(TASKS[task].title, f"{count:,}", *cells, end_section=task == tasks[-1])
    means = (_cell(evaluation.mean(*column), evaluation.mean_stderr(*column)) for column in columns)
    table.add_row("mean", "", *means, style="bold")
    return table


def _cell(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if stderr is None else f"{100 * value:.2f} ± {100 * stderr:.2f}"
