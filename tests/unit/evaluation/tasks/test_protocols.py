"""The two ways to ask: the wording, the letter that counts, and the harness's tasks made of them."""

import logging

import pytest
from lm_eval.api.task import ConfigurableTask
from plain_answers import PROMPT

from pat.errors import PatError
from pat.evaluation.tasks.protocols import (
    first_letter,
    is_decided,
    letter_prompt,
    likelihood_context,
    resolve_protocols,
    score_letter,
    task_config,
)
from pat.questions.hub import make_row

ROW = make_row("Question: Which?", ["one", "two ", "three"], 1)


@pytest.mark.parametrize(
    ("text", "num_choices", "letter"),
    [
        ("B", 4, "B"),
        (" C. two", 4, "C"),
        ("D", 3, None),
        ("The answer is B", 4, "B"),
        ("An apple, B", 4, "A"),
        ("b", 4, None),
        ("E or B", 4, "B"),
        ("", 2, None),
    ],
)
def test_the_first_capital_letter_of_a_choice_counts(text: str, num_choices: int, letter: str | None) -> None:
    assert first_letter(text, num_choices) == letter
    row = {"choices": ["x"] * num_choices, "answer": 1}
    assert is_decided(row, text) == (letter is not None)
    assert score_letter(row, [text]) == {"acc": float(letter == "B")}


def test_the_prompt_is_the_authors_under_the_alpaca_template() -> None:
    question = "Question: Which?\nA. one\nB. two \nC. three\nAnswer:"
    assert letter_prompt(ROW) == PROMPT.format(letters="'A', 'B', 'C'", question=question)


def test_no_letter_is_asked_for_where_none_is_shown() -> None:
    stem = (
        "There is a single choice question about law. Answer the question by replying A, B, C or D.\nQuestion: Which?"
    )
    row = make_row(stem, ["one", "two", "three", "four"], 1)
    assert likelihood_context(row) == "There is a single choice question about law.\nQuestion: Which?\nAnswer:"
    assert stem in letter_prompt(row)


def test_the_harness_makes_one_request_a_question_or_one_a_choice() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = {name: ConfigurableTask(config=task_config("siqa", name, [ROW, ROW])) for name in ("letter", "likelihood")}
    for task in tasks.values():
        task.build_all_requests()
    letter, likelihood = (tasks[name].instances for name in ("letter", "likelihood"))
    assert [request.args[0] for request in letter] == [letter_prompt(ROW)] * 2
    assert letter[0].args[1]["max_gen_toks"] == 5 and letter[0].args[1]["do_sample"] is False
    context = "Question: Which?\nAnswer:"
    assert [request.args for request in likelihood[:3]] == [(context, f" {c}") for c in ("one", "two", "three")]
    assert tasks["letter"].process_results(ROW, ["B"]) == {"acc": 1.0}
    scored = tasks["likelihood"].process_results(ROW, [(-3.0, False), (-2.0, True), (-2.5, False)])
    assert scored == {"acc": 1.0, "acc_norm": 0.0}  # -2.5 over the five characters of "three" is the best


def test_protocols_are_named_one_by_one() -> None:
    assert resolve_protocols("likelihood, letter") == ["likelihood", "letter"]
    for wrong in ("letter,words", "", []):
        with pytest.raises(PatError, match="letter, likelihood"):
            resolve_protocols(wrong)
