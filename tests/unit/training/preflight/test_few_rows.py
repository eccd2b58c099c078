"""Data that will not do for a cut are spoken of before training, and trials are not."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pat.data.record import DataRecord
from pat.training.preflight.few_rows import TRIAL_STEPS, remark, rows_read

ZEROS = {name: 0 for name, field in DataRecord.__dataclass_fields__.items() if field.type == "int"}


def record(num_examples: int, num_target_tokens: int, **facts: Any) -> DataRecord:
    known: dict[str, Any] = {"source": "rows.jsonl", "held_out_source": None, "format": "question/answer"}
    known |= {"template": "chat", "fingerprint": "", "unused_columns": ()}
    counts = {"num_examples": num_examples, "num_target_tokens": num_target_tokens}
    return DataRecord(**(ZEROS | known | counts | facts))


@pytest.mark.parametrize(
    ("data", "num_epochs", "ratio", "words"),
    [
        (record(54, 2_038), 1.04, 0.25, "once through 54 examples with 2,038 tokens to learn, which are few for a cut"),
        (record(54, 2_038), 3.0, 0.25, "3 times through 54 examples"),
        (record(54, 30_000), 1.0, 0.25, "few for a cut of 25.0 %"),
        (record(1_000, 124_000), 1.0, 0.25, "Train on more rows (125,000 tokens to learn or more)"),
        (record(380, 31_688, num_cut_away=8), 1.0, 0.125, "goes once through 372 examples"),  # as `rows_read` says
        (record(150, 400_000), 1.0, 0.25, "Train on more rows (200 examples or more)"),
        (record(150, 4_000), 1.0, 0.25, "Train on more rows (200 examples and 125,000 tokens to learn or more)"),
        (record(380, 31_688), 1.0, 0.125, "expect a model that answers worse than the base"),
        (record(1_000, 90_000, num_cut_target_tokens=83_000), 1.0, 0.25, "with 7,000 tokens to learn"),
        (record(326, 5_484), 160 / 326, 0.136, "The steps read 49 % of the data, with some 2,692 tokens to learn"),
        (
            record(326, 5_484),
            160 / 326,
            0.136,
            "Take more steps (82 read all examples once) and more rows (68,000 tokens to learn or more)",
        ),
        (
            record(54, 2_038),
            0.4,
            0.25,
            "(100 read all examples once) and more rows (200 examples and 125,000 tokens to learn or more), or mix",
        ),
        (record(4_000, 150_000), 0.4, 0.25, "Take more steps (100 read all examples once), or cut less"),
        (record(2_000, 350_000), 0.4, 0.25, None),
        (record(5, 350_000, format="text"), 0.4, 0.25, None),
        (record(201, 125_001), 1.7, 0.25, None),
        (record(5, 125_000, format="text"), 1.0, 0.25, None),
        (record(1_000, 150_000), 40.0, 0.25, "40 times through the same 1,000 examples"),
        (record(1_000, 150_000), 3.0, 0.25, None),
    ],
)
def test_too_little_is_said(data: DataRecord, num_epochs: float, ratio: float, words: str | None) -> None:
    said = remark(data, num_epochs, ratio, num_steps=40)
    assert said is None if words is None else words in (said or "") and "more" in (said or "")


def test_a_trial_of_some_steps_is_not_spoken_to() -> None:
    assert remark(record(52_000, 3_000_000), 0.0004, 0.25, TRIAL_STEPS) is None
    assert remark(record(52_000, 3_000_000), 0.0004, 0.25, TRIAL_STEPS + 1)


@pytest.mark.parametrize(
    ("num_rows", "num_steps", "rows_per_step", "words"),
    [
        (380, 40, 4, "40 steps of 4 read 160 of the 380 examples (0.42 epochs)"),
        (52_000, 5, 4, "5 steps of 4 read 20 of the 52,000 examples (less than 0.01 epochs)"),
        (52_000, 1, 4, "1 step of 4 reads 4 of the 52,000 examples (less than 0.01 epochs)"),
        (100, 6, 64, "6 steps of 64 go 3 times through the 100 examples"),  # the second step of each takes 36
        (380, 95, 4, "95 steps of 4 go once through the 380 examples"),
        (380, 1_000, 2, "1,000 steps of 2 go 5.3 times through the 380 examples"),
        (190, 40, 2, "40 steps of 2 read 80 of the 190 rows of an epoch (0.42 epochs)"),  # packed, or drawn
        (380, 1, None, "1 step"),
    ],
)
def test_what_the_steps_read_is_said(num_rows: int, num_steps: int, rows_per_step: int | None, words: str) -> None:
    data: Any = SimpleNamespace(
        train=range(num_rows), stream=None, record=record(num_rows if num_rows != 190 else 380, 9)
    )
    assert rows_read(data, num_steps, rows_per_step) == words
    # Of 8 examples more nothing is left to learn.
    known = data.record
    data.record = replace(known, num_examples=known.num_examples + 8, num_cut_away=5, num_without_targets=3)
    assert rows_read(data, num_steps, rows_per_step) == words
    streamed: Any = SimpleNamespace(train=range(num_rows), stream=object())
    assert rows_read(streamed, 40, 4) == "40 steps of 4 examples"


def test_sources_of_texts_and_answers_are_looked_at_together() -> None:
    parts: Any = [replace(record(54, 65_000), format=name) for name in ("text", "messages")]
    assert remark(record(108, 130_000, format="text, messages", sources=tuple(parts)), 1.0, 0.25, 40)
    assert not remark(record(108, 130_000, format="text", sources=(parts[0],)), 1.0, 0.25, 40)
