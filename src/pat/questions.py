"""The questions of the paper's 14 tasks: from local files or the hub's datasets, in the authors' wording.

A converter of a hub row returns None for a row that the paper's set leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from pat.errors import PatError

LETTERS = "ABCDEFGH"

REPLY_BY_LETTER = " Answer the question by replying A, B, C or D."
"""Part of the stem of MMLU; out of place where no letters are shown."""

INSTRUCTION = (
    "Answer the question by replying the index of the correct choice, which should be one of {letters}.\n"
    "{question}\nThe index of the answer is"
)
"""The authors write the letters as a Python list without its brackets."""

PAPER = "paper"
"""Name of the whole set."""


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
    prompt = f"{stem}\n{shown}{ending}"
    return {"stem": stem, "choices": [choice.strip() for choice in choices], "answer": answer, "prompt": prompt}


def letter_instruction(row: Mapping[str, Any]) -> str:
    """Return what a model is told to do with a question: answer by a letter."""
    letters = ", ".join(repr(letter) for letter in LETTERS[: len(row["choices"])])
    return INSTRUCTION.format(letters=letters, question=row["prompt"])


def letter_answer(row: Mapping[str, Any]) -> str:
    """Return the right letter."""
    return LETTERS[row["answer"]]


def _yes_no(stem: str, label: Any) -> Row:
    return make_row(stem, ("Yes", "No"), 1 - int(label))  # a label that is neither stays no valid answer


def _labelled(stem: str, row: Mapping[str, Any]) -> Row:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return make_row(stem, texts, labels.index(row["answerKey"]))


def _arc(row: Mapping[str, Any]) -> Row | None:
    """Leave out the few questions that do not have four choices."""
    return _labelled(f"Question: {row['question']}", row) if len(row["choices"]["text"]) == 4 else None


def _boolq(row: Mapping[str, Any]) -> Row:
    return _yes_no(f"{row['passage']}\nQuestion: {row['question']}", row["label"])


def _copa(row: Mapping[str, Any]) -> Row:
    stem = f"{row['premise']}\nQuestion: Which may be the {row['question']}?"
    return make_row(stem, [row["choice1"], row["choice2"]], int(row["label"]))


def _hellaswag(row: Mapping[str, Any]) -> Row:
    stem = f"{_without_wikihow_marks(row['activity_label'] + ': ' + row['ctx'])}\n"
    choices = [_without_wikihow_marks(ending) for ending in row["endings"]]
    return make_row(f"{stem}Question: Which ending makes the most sense?", choices, int(row["label"]))


def _mmlu(row: Mapping[str, Any]) -> Row:
    """Convert a question of one of 57 subjects; those to train on have none."""
    about = f" about {row['subject'].replace('_', ' ')}" if row["subject"] else ""
    stem = f"There is a single choice question{about}.{REPLY_BY_LETTER}\nQuestion: {row['question']}"
    question = make_row(stem, row["choices"], int(row["answer"]), ending="Answer: ")
    return {**question, "subject": row["subject"]}


def _multirc(row: Mapping[str, Any]) -> Row:
    stem = f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer: {row['answer']}\nIs it true?"
    return _yes_no(stem, row["label"])


def _openbookqa(row: Mapping[str, Any]) -> Row:
    return _labelled(f"Given the fact: {row['fact1']}\nQuestion: {row['question_stem']}", row)


def _piqa(row: Mapping[str, Any]) -> Row:
    return make_row(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))


def _rte(row: Mapping[str, Any]) -> Row:
    """Convert a premise and a hypothesis; label 0 is entailment."""
    stem = f"{row['premise']}\n{row['hypothesis']}\nIs the sentence below entailed by the sentence above?"
    return make_row(stem, ("Yes", "No"), int(row["label"]))


def _siqa(row: Mapping[str, Any]) -> Row:
    """Convert a question about what people do, want and feel; its labels count from 1."""
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return make_row(f"{row['context']}\nQuestion: {row['question']}", choices, int(row["label"]) - 1)


def _wic(row: Mapping[str, Any]) -> Row:
    """Ask whether a word means the same in two sentences; the authors' spelling is part of their prompt."""
    sentences = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\n"
    return _yes_no(f"{sentences}Are '{row['word']}' in the above two sentenses the same?", row["label"])


def _winogrande(row: Mapping[str, Any]) -> Row:
    """Ask which of two fills the blank; answers count from 1."""
    return make_row(f"Question: {row['sentence']}", [row["option1"], row["option2"]], int(row["answer"]) - 1)


def _wsc(row: Mapping[str, Any]) -> Row:
    """Ask whether a pronoun, marked #, refers to a noun, marked *."""
    noun, pronoun = f"* {row['span1_text']} *", f"# {row['span2_text']} #"
    spans = [(row["span1_index"], row["span1_text"], noun), (row["span2_index"], row["span2_text"], pronoun)]
    text = row["text"]
    for index, span, marked in sorted(spans, reverse=True):  # the later one first: the earlier one's place stays
        text = _mark(text, index, span, marked)
    return _yes_no(f"Passage: {text}\nQuestion: Does the pronoun {pronoun} refer to {noun}?", row["label"])


def _mark(text: str, word_index: int, span: str, marked: str) -> str:
    """Mark a span that begins at a word of the text; where the dataset's index is wrong, nothing is marked."""
    words = list(re.finditer(r"\S+", text))
    start = words[word_index].start() if word_index < len(words) else len(text)
    return f"{text[:start]}{marked}{text[start + len(span) :]}" if text.startswith(span, start) else text


def _without_wikihow_marks(text: str) -> str:
    """Drop the bracketed marks that WikiHow articles left in HellaSwag, such as [step] and [title]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


@dataclass(frozen=True)
class Task:
    """One task, and the dataset of the hub where its questions come from when there is no local file."""

    name: str
    convert: Callable[[Mapping[str, Any]], Row | None]
    path: str
    """Dataset id on the hub."""
    config: str | None = None
    split: str = "validation"
    """The split that is asked: the one with public answers."""
    train_split: str = "train"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("arc_challenge", _arc, "allenai/ai2_arc", "ARC-Challenge"),
        Task("arc_easy", _arc, "allenai/ai2_arc", "ARC-Easy"),
        Task("boolq", _boolq, "aps/super_glue", "boolq"),
        Task("copa", _copa, "aps/super_glue", "copa"),
        Task("hellaswag", _hellaswag, "Rowan/hellaswag"),
        Task("mmlu", _mmlu, "cais/mmlu", "all", "test", "auxiliary_train"),
        Task("multirc", _multirc, "aps/super_glue", "multirc"),
        Task("openbookqa", _openbookqa, "allenai/openbookqa", "additional", "test"),
        Task("piqa", _piqa, "baber/piqa"),
        Task("rte", _rte, "aps/super_glue", "rte"),
        Task("siqa", _siqa, "lighteval/siqa"),
        Task("wic", _wic, "aps/super_glue", "wic"),
        Task("winogrande", _winogrande, "allenai/winogrande", "winogrande_xl"),
        Task("wsc", _wsc, "aps/super_glue", "wsc.fixed"),
    )
}


def resolve_tasks(names: str | Sequence[str]) -> list[str]:
    """Return the tasks of a list of names, each of which may hold several with commas between; `paper` means all 14.

    Raises:
        PatError: a name that is not a task, or none at all.
    """
    given = [name.strip() for item in ([names] if isinstance(names, str) else names) for name in item.split(",")]
    unknown = [name for name in given if name != PAPER and name not in TASKS]
    if unknown or not given:
        what = f"the unknown task(s) {', '.join(map(repr, unknown))}" if unknown else "no task"
        raise PatError(f"Got {what}; expected {PAPER} (all 14) or some of {', '.join(TASKS)}.")
    return list(dict.fromkeys(name for item in given for name in (TASKS if item == PAPER else (item,))))


def load_rows(name: str, data_dir: str | Path | None, *, split: str | None = None) -> list[Row]:
    """Return the questions of a task, by default those that are asked; `train` is the task's train split.

    They come from a folder with a `<task>.jsonl`, and a `<task>.train.jsonl` to train on, or without one from the hub,
    which alone knows slices of the train split.

    Raises:
        PatError: no such file, dataset or split, or rows that are not questions.
    """
    task = TASKS[name]
    if data_dir is None:
        rows = _hub_rows(task, split)
    elif split in (None, "train"):
        from pat.readers import good_rows

        path = Path(data_dir) / f"{name}{'' if split is None else '.train'}.jsonl"
        if not path.is_file():
            raise PatError(f"{path}: no such file; expected the task's questions, one JSON object a line.")
        rows = [_checked(row, place) for place, row in good_rows(path)]
    else:
        raise PatError(f"Got split {split!r} of files of questions; expected 'train', which is <task>.train.jsonl.")
    if not rows:
        raise PatError(f"The task {name} has no questions; expected at least one.")
    return rows


def evenly_spaced(num_rows: int, limit: int | None) -> list[int]:
    """Return the indices of `limit` rows, evenly spaced and ascending, or of all: files are often sorted by subject."""
    count = num_rows if limit is None else min(limit, num_rows)
    return [number * num_rows // count for number in range(count)]


def _hub_rows(task: Task, split: str | None) -> list[Row]:
    from datasets import load_dataset

    # `train` and its slices, or a sum of them, are the task's own train split, whatever that is called.
    parts = [re.sub(r"^\s*train(?=\s*(\[|$))", task.train_split, part) for part in split.split("+")] if split else []
    own = "+".join(parts) or task.split
    try:
        dataset = load_dataset(task.path, task.config, split=own)
    except Exception as error:  # whatever its parsers, file systems and HTTP client raise
        reason = str(error).strip().split("\n")[0]
        files = "--data_dir with files" if split is None else f"task:FOLDER/{task.name} with files to train on"
        raise PatError(
            f"Could not load the questions of {task.name} ({task.path}, split {own!r}) from the hub: {reason}; pass "
            f"{files}, or go online."
        ) from error
    rows: list[Row] = []
    for number, entry in enumerate(dataset, start=1):
        where = f"{task.path}, split {own!r}, row {number}"
        try:
            row = task.convert(cast(dict[str, Any], entry))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise PatError(f"{where}: is not a question of {task.name} ({type(error).__name__}: {error}).") from error
        if row is not None:
            rows.append(_checked(row, where))
    return rows


def _checked(row: Any, where: str) -> Row:
    """Return a question without fields that are not ours."""
    if not _is_row(row):
        fields = "stem and prompt (text), choices (a list of two texts or more) and answer (index of the right one)"
        raise PatError(f"{where}: is not a question; expected {fields}.")
    return cast(Row, {name: row[name] for name in Row.__annotations__ if name in row})


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("stem", "prompt")):
        return False
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(row.get("subject", ""), str) or not isinstance(choices, list):
        return False
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) and choice for choice in choices):
        return False
    return type(answer) is int and 0 <= answer < len(choices)  # a bool is an int, too
