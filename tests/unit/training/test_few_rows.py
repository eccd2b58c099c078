"""Data that will not do for a cut are spoken of before training, and trials are not."""

from dataclasses import replace
from typing import Any

import pytest

from pat.data.record import DataRecord
from pat.training.few_rows import remark

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
        (record(1_000, 7_000), 1.0, 0.25, "few for a cut of 25.0 %"),
        (record(1_000, 90_000, num_cut_target_tokens=83_000), 1.0, 0.25, "with 7,000 tokens to learn"),
        (record(326, 5_484), 160 / 326, 0.136, None),  # the demo's
        (record(201, 7_501), 1.7, 0.25, None),
        (record(5, 30_000, format="text"), 1.0, 0.25, None),
        (record(52_000, 3_000_000), 0.0004, 0.25, None),  # --max_steps 5
        (record(54, 2_038), 0.4, 0.25, None),
        (record(1_000, 50_000), 40.0, 0.25, "40 times through the same 1,000 examples"),
        (record(1_000, 50_000), 3.0, 0.25, None),
    ],
)
def test_too_little_is_said(data: DataRecord, num_epochs: float, ratio: float, words: str | None) -> None:
    said = remark(data, num_epochs, ratio)
    assert said is None if words is None else words in (said or "") and "Train on more rows" in (said or "")


def test_sources_of_texts_and_answers_are_looked_at_together() -> None:
    parts: Any = [replace(record(54, 30_000), format=name) for name in ("text", "messages")]
    assert remark(record(108, 60_000, format="text, messages", sources=tuple(parts)), 1.0, 0.25)
    assert not remark(record(108, 60_000, format="text", sources=(parts[0],)), 1.0, 0.25)
