"""The functions that the task files beside this module name; stock `lm_eval --include_path` calls them, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from pat.data.formats import ALPACA
from pat.questions import LETTERS, REPLY_BY_LETTER, letter_answer, letter_instruction, load_rows


def load_questions(*, task: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Return the questions of a task, from `data_dir` or from the hub.

    lm-evaluation-harness passes the `dataset_kwargs` of the task file and the `metadata` of the run.
    """
    return {"test": Dataset.from_list([dict(row) for row in load_rows(task, data_dir)])}


def letter_prompt(row: Mapping[str, Any]) -> str:
    """Return the paper's prompt of a question."""
    return ALPACA.format(instruction=letter_instruction(row))


def score_letter(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer by the first capital letter in it that stands for a choice; none at all is a wrong answer."""
    letters = LETTERS[: len(row["choices"])]
    letter = next((character for character in results[0] if character in letters), None)
    return {"acc": float(letter == letter_answer(row)), "no_letter": float(letter is None)}


def likelihood_context(row: Mapping[str, Any]) -> str:
    """Return what precedes each choice: nothing that asks for a letter, because no letters are shown."""
    return f"{row['stem'].replace(REPLY_BY_LETTER, '', 1)}\nAnswer:"
