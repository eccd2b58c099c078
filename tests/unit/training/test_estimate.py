"""What is said of the time that a run takes: padding and what is left count, and nothing random moves on."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import build
from torch import nn

from pat.training.arguments import TuneArguments, build_arguments
from pat.training.estimate import PASSES, Seen, ToDo, expected_seconds, num_padded, sample_batches, span
from pat.training.folder import Start
from pat.training.results import ModelFigures

SECONDS_PER_TOKEN = 3e-4
LENGTHS = [4, 4, 4, 100] * 50


class Slow(nn.Module):
    """A model that takes a known time for each token."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        time.sleep(SECONDS_PER_TOKEN * input_ids.numel())
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 1))


def arguments(**flags: Any) -> TuneArguments:
    return build_arguments(
        model_name_or_path="base", dataset_name="rows.jsonl", output_dir="out", bf16=False, use_cpu=True, **flags
    )


def data() -> Any:
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in LENGTHS]
    return SimpleNamespace(
        train=Dataset.from_list(rows),
        stream=None,
        num_tokens=sum(LENGTHS),
        held_out=[],
        general=None,
        verify_on=[],
        vocabulary=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),
    )


def seconds(todo: ToDo, scoring: float = 0.0, **flags: Any) -> float:
    shape = SimpleNamespace(pruning_ratio=0.25, cuts=lambda name: False, size=lambda name: 2)
    checked: Any = SimpleNamespace(shape=shape, base_config=build("llama", tied=True).config)
    seen = Seen(ModelFigures(1, 2), scoring_seconds=scoring, answering_seconds=0.0)
    return expected_seconds(arguments(**flags), checked, data(), Slow(), seen, todo)


def test_batches_are_those_of_the_trainer_with_their_padding() -> None:
    few = arguments(per_device_train_batch_size=4)
    state = torch.get_rng_state()
    batches = sample_batches(few, data())
    assert torch.equal(state, torch.get_rng_state()) and {len(batch) for batch in batches} == {4}
    assert sorted(row for batch in batches for row, _ in batch) == list(range(len(LENGTHS)))
    assert num_padded(few, [3, 5]) == 10
    assert num_padded(arguments(pad_to_multiple_of=8), [3, 5]) == 16
    assert num_padded(arguments(padding_free=True), [3, 5]) == 8
    lengths = [[length for _, length in batch] for batch in sample_batches(few, data())]
    by_length = sample_batches(
        arguments(per_device_train_batch_size=4, train_sampling_strategy="group_by_length"), data()
    )
    grouped = [num_padded(few, [length for _, length in batch]) for batch in by_length]
    assert sum(grouped) < 0.7 * sum(num_padded(few, of) for of in lengths)


def test_padding_steps_and_scoring_are_reckoned_with() -> None:
    flags = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    few = arguments(**flags)
    batches = [[length for _, length in batch] for batch in sample_batches(few, data())]
    padded = sum(num_padded(few, batch) for batch in batches) / len(batches)
    assert padded > 2 * sum(LENGTHS) / len(LENGTHS) * 4  # what makes the difference here
    step = PASSES * 2 * padded * SECONDS_PER_TOKEN
    # Sleeping takes a little longer than asked for.
    assert step <= seconds(ToDo(soft_steps=10), **flags) / 10 < 2 * step
    assert seconds(ToDo(small_steps=10, goes_small=False), **flags) > 1.2 * seconds(ToDo(small_steps=10), **flags)
    assert seconds(ToDo(), scoring=40.0) == pytest.approx(2 * 0.75 * 40)  # of the tuned and of the written model
    assert seconds(ToDo(goes_small=False), scoring=40.0) == pytest.approx(1.75 * 40)


def test_what_is_done_is_not_expected_again(tmp_path: Path) -> None:
    def left(checkpoint: Path | None, kind: str = "PAT", step: int = 0) -> ToDo:
        if checkpoint is not None:
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
            (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        start = Start(None if checkpoint is None else str(checkpoint))
        return ToDo.of(start, 4, 10, 1000, goes_small=True)

    assert left(None) == ToDo(4, 6, 1000, goes_small=True, compacts=True)
    assert left(tmp_path / "a", step=3) == ToDo(1, 6, 1000, goes_small=True, compacts=True)
    assert left(tmp_path / "a", step=4) == ToDo(0, 6, 0, goes_small=True, compacts=True)
    assert left(tmp_path / "a", "LORA", 7) == ToDo(0, 3, 0, goes_small=True, compacts=False)
    assert ToDo.of(Start(is_trained=True), 4, 10, 1000, goes_small=True) == ToDo()


def test_a_duration_is_a_range_in_words() -> None:
    assert [span(value) for value in (20, 60, 300, 20_000)] == [
        "less than a minute",
        "1 to 2 minutes",
        "4 to 8 minutes",
        "4 to 8 hours",
    ]
