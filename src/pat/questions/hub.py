"""Rows of the hub's datasets as questions in the wording of the paper's evaluation, one function a task.

Every function takes one row of a dataset and returns a `Row`, or None for a row that the paper's set leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

LETTERS = "ABCDEFGH"

YES_NO = ("Yes", "No")

REPLY_BY_LETTER = " Answer the question by replying A, B, C or D."
"""Part of the stem of MMLU; out of place where no letters are shown."""


class Row(TypedDict):
    """One question, as in the files of `--data_dir`."""

    stem: str
    """The question without its choices."""
    choices: list[str]
    answer: int
    """Index of the right choice."""
    prompt: str
    """The stem, the choices with their letters, and `Answer:`."""
    subject: NotRequired[str]


def make_row(stem: str, choices: Sequence[str], answer: int, *, ending: str = "Answer:") -> Row:
    """Put a question together; the prompt shows the choices as they are, `choices` has them without outer spaces."""
    shown = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
    return {
        "stem": stem,
        "choices": [choice.strip() for choice in choices],
        "answer": answer,
        "prompt": f"{stem}\n{shown}{ending}",
    }


def arc(row: Mapping[str, Any]) -> Row | None:
    """Questions of the AI2 Reasoning Challenge; the few that do not have four choices are left out."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if len(texts) != 4:
        return None
    return make_row(f"Question: {row['question']}", texts, labels.index(row["answerKey"]))


def boolq(row: Mapping[str, Any]) -> Row:
    """A passage and a yes/no question on it."""
    return _yes_no(f"{row['passage']}\nQuestion: {row['question']}", row["label"])


def copa(row: Mapping[str, Any]) -> Row:
    """The cause or the effect of a premise."""
    stem = f"{row['premise']}\nQuestion: Which may be the {row['question']}?"
    return make_row(stem, [row["choice1"], row["choice2"]], int(row["label"]))


def hellaswag(row: Mapping[str, Any]) -> Row:
    """Four endings of a description."""
    stem = f"{_without_wikihow_marks(row['activity_label'] + ': ' + row['ctx'])}\n"
    choices = [_without_wikihow_marks(ending) for ending in row["endings"]]
    return make_row(f"{stem}Question: Which ending makes the most sense?", choices, int(row["label"]))


def mmlu(row: Mapping[str, Any]) -> Row:
    """Exam questions of 57 subjects; those to train on have none."""
    subject = row["subject"]
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    stem = f"There is a single choice question{about}.{REPLY_BY_LETTER}\nQuestion: {row['question']}"
    question = make_row(stem, row["choices"], int(row["answer"]), ending="Answer: ")
    question["subject"] = subject
    return question


def multirc(row: Mapping[str, Any]) -> Row:
    """Whether one answer to a question on a paragraph is right."""
    return _yes_no(
        f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer: {row['answer']}\nIs it true?", row["label"]
    )


def openbookqa(row: Mapping[str, Any]) -> Row:
    """Elementary science, with the fact from the open book."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    stem = f"Given the fact: {row['fact1']}\nQuestion: {row['question_stem']}"
    return make_row(stem, texts, labels.index(row["answerKey"]))


def piqa(row: Mapping[str, Any]) -> Row:
    """Two ways to reach a goal."""
    return make_row(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def rte(row: Mapping[str, Any]) -> Row:
    """Whether a premise entails a hypothesis; label 0 is entailment."""
    stem = f"{row['premise']}\n{row['hypothesis']}\nIs the sentence below entailed by the sentence above?"
    return make_row(stem, YES_NO, int(row["label"]))


def siqa(row: Mapping[str, Any]) -> Row:
    """What people do, want and feel; labels count from 1."""
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return make_row(f"{row['context']}\nQuestion: {row['question']}", choices, int(row["label"]) - 1)


def wic(row: Mapping[str, Any]) -> Row:
    """Whether a word means the same in two sentences; the authors' spelling is part of their prompt."""
    stem = (
        f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n"
        f"Are '{row['word']}' in the above two sentenses the same?"
    )
    return _yes_no(stem, row["label"])


def winogrande(row: Mapping[str, Any]) -> Row:
    """Which of two fills the blank; answers count from 1."""
    return make_row(f"Question: {row['sentence']}", [row["option1"], row["option2"]], int(row["answer"]) - 1)


def wsc(row: Mapping[str, Any]) -> Row:
    """Whether a pronoun, marked #, refers to a noun, marked *."""
    noun, pronoun = f"* {row['span1_text']} *", f"# {row['span2_text']} #"
    spans = [(row["span1_index"], row["span1_text"], noun), (row["span2_index"], row["span2_text"], pronoun)]
    text = row["text"]
    for index, span, marked in sorted(spans, reverse=True):  # the later one first: the earlier one's place stays
        text = _mark(text, index, span, marked)
    return _yes_no(f"Passage: {text}\nQuestion: Does the pronoun {pronoun} refer to {noun}?", row["label"])


def _yes_no(stem: str, label: Any) -> Row:
    return make_row(stem, YES_NO, 1 - int(label))  # a label that is neither stays no valid answer


def _mark(text: str, word_index: int, span: str, marked: str) -> str:
    """Mark a span that begins at a word of the text; where the dataset's index is wrong, nothing is marked."""
    words = list(re.finditer(r"\S+", text))
    start = words[word_index].start() if word_index < len(words) else len(text)
    return f"{text[:start]}{marked}{text[start + len(span) :]}" if text.startswith(span, start) else text


def _without_wikihow_marks(text: str) -> str:
    """Drop the bracketed marks that WikiHow articles left in HellaSwag, such as [step] and [title]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
