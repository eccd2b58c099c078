"""Two ways to ask a question, as configurations of lm-evaluation-harness tasks.

*letter*, the paper's: the model answers the authors' prompt under the Alpaca template, greedily and in at most five
tokens, and the first capital letter among those of the choices counts.

*likelihood*, the harness's own scoring: which choice's text is the likeliest after the question (`acc`), and which is
per character (`acc_norm`). The context is the stem and `Answer:`, the continuation a space and the choice. The wording
is ours, and figures not those of the harness's own tasks. One wording for all tasks: the stems differ already, and the
choices are not listed, or their likelihood would mostly say how well the model copies. `acc_norm` needs choices of
text, which is why the letters are not what is scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pat.errors import PatError
from pat.questions.hub import LETTERS, REPLY_BY_LETTER, Row, make_row
from pat.questions.wording import letter_instruction
from pat.training.formats import ALPACA

MAX_NEW_TOKENS = 5


def letter_prompt(row: Mapping[str, Any]) -> str:
    """Return the paper's prompt of a question."""
    return ALPACA.format(instruction=letter_instruction(row))


def first_letter(text: str, num_choices: int) -> str | None:
    """Return the first capital letter of a text that stands for one of so many choices, or None."""
    return next((character for character in text if character in LETTERS[:num_choices]), None)


def is_decided(row: Mapping[str, Any], text: str) -> bool:
    """Tell whether nothing that follows this answer can change the letter that counts."""
    return first_letter(text, len(row["choices"])) is not None


def score_letter(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer: lm-evaluation-harness's `process_results`. No letter is a wrong one."""
    return {"acc": float(first_letter(results[0], len(row["choices"])) == LETTERS[row["answer"]])}


def likelihood_context(row: Mapping[str, Any]) -> str:
    """Return what precedes each choice: nothing that asks for a letter, because no letters are shown."""
    return f"{row['stem'].replace(REPLY_BY_LETTER, '', 1)}\nAnswer:"


def fingerprint_wording() -> dict[str, str]:
    """Return a digest of how each protocol asks a question."""
    row = make_row(f"Is it so?{REPLY_BY_LETTER}\nQuestion: Which?", ["one", "two ", "three"], 1)
    rendered = {"letter": letter_prompt(row), "likelihood": likelihood_context(row)}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in rendered.items()}


def task_config(name: str, protocol: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the configuration of a harness task over these questions; `ConfigurableTask(config=...)` takes it."""
    metrics = ("acc",) if protocol == "letter" else ("acc", "acc_norm")
    common = {
        "task": f"{name}_{protocol}",
        "custom_dataset": lambda: {"test": _dataset(rows)},
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }
    if protocol == "letter":
        return common | {
            "output_type": "generate_until",
            "doc_to_text": letter_prompt,
            "doc_to_target": lambda row: LETTERS[row["answer"]],
            "generation_kwargs": {"until": [], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
            "process_results": score_letter,
        }
    return common | {
        "output_type": "multiple_choice",
        "doc_to_text": likelihood_context,
        "doc_to_choice": lambda row: row["choices"],
        "doc_to_target": lambda row: row["answer"],
        "target_delimiter": " ",
    }


PROTOCOLS = ("letter", "likelihood")


def resolve_protocols(names: str | Sequence[str]) -> list[str]:
    """Return the protocols of a list of names, or of names separated by commas.

    Raises:
        PatError: a name that is not a protocol, or none at all.
    """
    given = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    unknown = [name for name in given if name not in PROTOCOLS]
    if unknown or not given:
        what = ", ".join(map(repr, unknown)) or "none"
        raise PatError(f"Got the protocol(s) {what}; expected some of {', '.join(PROTOCOLS)}.")
    return list(dict.fromkeys(given))


def _dataset(rows: Sequence[Row]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])
