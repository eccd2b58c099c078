"""The authors' wording around a question, to ask it and to train on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pat.questions.hub import LETTERS

INSTRUCTION = (
    "Answer the question by replying the index of the correct choice, which should be one of {letters}.\n"
    "{question}\nThe index of the answer is"
)
"""They write the letters as a Python list without its brackets."""


def letter_instruction(row: Mapping[str, Any]) -> str:
    """Return what a model is told to do with a question: answer by a letter."""
    letters = ", ".join(repr(letter) for letter in LETTERS[: len(row["choices"])])
    return INSTRUCTION.format(letters=letters, question=row["prompt"])


def letter_answer(row: Mapping[str, Any]) -> str:
    """Return the right letter."""
    return LETTERS[row["answer"]]
