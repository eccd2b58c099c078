"""The expected time of a run counts padding and what is left, and drawing its sample moves nothing random on."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import build
from torch import nn

from pat import ranks
from pat.surgery.costs import build_skeleton, cost_of, usual_context
from pat.training.arguments import TuneArguments, build_arguments
from pat.training.outcome.samples import MAX_NEW_TOKENS, NUM_PROMPTS
from pat.training.preflight import estimate, speed
from pat.training.preflight.announce import _reading, _stages
from pat.training.preflight.estimate import (
    BYTES_PER_TOKEN,
    COMPARING,
    ORDERING_FLOPS,
    PASSES,
    PASSES_UNDER_AUTOCAST,
    WITH_ADAPTER,
    Reading,
    ToDo,
    expect,
    span,
    step_span,
)
from pat.training.preflight.speed import Speed, num_padded, sample_batches
from pat.training.run.folder import Start
from pat.tuner.calibration import DEFAULT_TOKENS_PER_CHANNEL
from pat.tuner.depth import LAYER_TOKENS
from pat.tuner.refit import TOKENS_PER_CHANNEL

SECONDS_PER_TOKEN = 3e-4
READING_SECONDS = 1e-3
"""Seconds to read a token in the base's own number format."""
WRITING_SECONDS = 0.02
ANSWERING = NUM_PROMPTS * MAX_NEW_TOKENS * WRITING_SECONDS
"""Seconds that the base takes to answer the prompts."""
LENGTHS = [4, 4, 4, 100] * 50
SMALL = 0.75
"""Share of the base's parameters that stays."""
TUNED = WITH_ADAPTER * SMALL
NUM_VERIFIED = 20
HEADS = 80
"""Channels of all heads of a tiny Llama together."""


def arguments(**flags: Any) -> TuneArguments:
    flags = {"bf16": False, "use_cpu": True} | flags
    return build_arguments(model_name_or_path="base", dataset_name="rows.jsonl", output_dir="out", **flags)


def data(num_scored: int = 0, *, streams: bool = False) -> Any:
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in LENGTHS]
    return SimpleNamespace(
        train=Dataset.from_list(rows),
        stream=object() if streams else None,
        num_tokens=sum(LENGTHS),
        held_out=[{"input_ids": [1] * num_scored}] if num_scored else [],
        general=None,
        evaluation=None,
        verify_on=[{"input_ids": torch.zeros(2, NUM_VERIFIED // 2)}] if num_scored else [],
        vocabulary=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),
    )


def checked(*cut: str, family: str = "llama") -> Any:
    """Return what is known of a base of 2 layers, of each of which the MLP has 6 channels."""
    sizes = {"layers": 2, "mlp": 6, "hidden": 48}
    shape = SimpleNamespace(pruning_ratio=1 - SMALL, cuts=lambda name: name in cut, size=sizes.__getitem__)
    return SimpleNamespace(shape=shape, base_config=build(family, tied=True).config)


def seconds(todo: ToDo, about: Any = None, of: Any = None, **flags: Any) -> float:
    """Return the seconds that are expected, but for the answers of the small model."""
    return expect(arguments(**flags), about or checked(), of or data(), None, todo).seconds - SMALL * ANSWERING


@pytest.fixture
def known_time(monkeypatch: pytest.MonkeyPatch) -> float:
    """Have the base take a known time, and return that of a mean batch of four rows with its padding."""
    known = Speed(training=SECONDS_PER_TOKEN, reading=READING_SECONDS, writing=WRITING_SECONDS)
    monkeypatch.setattr(estimate, "time_base", lambda *_: known)
    few = arguments(per_device_train_batch_size=4)
    batches = [[length for _, length in batch] for batch in sample_batches(few, data())]
    padded = sum(num_padded(few, batch) for batch in batches) / len(batches)
    assert padded > 2 * sum(LENGTHS) / len(LENGTHS) * 4  # what makes the difference here
    return padded * SECONDS_PER_TOKEN


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


@pytest.mark.parametrize(
    ("todo", "flags", "passes"),
    [
        (ToDo(soft_steps=10), {}, 10 * PASSES),
        (ToDo(small_steps=10), {}, 10 * PASSES * SMALL),
        (ToDo(small_steps=10), {"bf16": True}, 10 * PASSES_UNDER_AUTOCAST * SMALL),
        (ToDo(soft_steps=2, small_steps=10, goes_small=False), {}, 12 * PASSES),
        (ToDo(small_steps=10), {"gradient_accumulation_steps": 2}, 20 * PASSES * SMALL),
        (ToDo(soft_steps=2, small_steps=10), {"gradient_checkpointing": True}, (2 + 10 * SMALL) * (PASSES + 1)),
        (ToDo(soft_steps=2, small_steps=10), {"distill": True}, (2 + 10 * SMALL) * PASSES + 10),  # the teacher's
    ],
)
def test_steps_are_passes_over_padded_batches(
    todo: ToDo, flags: dict[str, Any], passes: float, known_time: float
) -> None:
    flags = {"per_device_train_batch_size": 4, "gradient_checkpointing": False} | flags
    assert seconds(todo, **flags) == pytest.approx(passes * known_time)


def test_each_reading_has_as_many_tokens_as_its_text(
    tmp_path: Path, known_time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(rotation: int, refit: int, layers: int, **more: Any) -> float:
        todo = ToDo(reading=Reading(rotation, refit, layers))
        return seconds(todo, per_device_train_batch_size=4, **more) / SECONDS_PER_TOKEN

    there = sum(LENGTHS)
    filled = known_time / SECONDS_PER_TOKEN / (4 * there / len(LENGTHS))
    assert read(100, 20, 3) == pytest.approx(filled * (100 + 20 + 2 * 3))  # of two layers
    many = (there + 1, there - 1, there + 2)
    assert read(*many) == pytest.approx(filled * (there + there - 1 + 2 * there))
    assert read(*many, of=data(streams=True)) == pytest.approx(filled * (there + 1 + there - 1 + 2 * (there + 2)))
    text = tmp_path / "text.txt"
    text.write_text("a" * 10 * BYTES_PER_TOKEN)
    assert read(100, 6, 100, calibration=str(text)) == pytest.approx(10 + 6 + 2 * 10)  # its pieces are full
    monkeypatch.setattr(ranks, "num_processes", lambda: 2)
    assert read(there + 2, 20, 4) == pytest.approx(filled * (there / 2 + 10 + 2 * 2))


@pytest.mark.parametrize(
    ("cut", "family", "each"),
    [
        (["mlp"], "llama", [(6, 1, 1)]),
        (["mlp", "layers", "hidden"], "llama", [(6, 1, 1)]),
        (["mlp", "heads"], "llama", [(6, 1, 1), (HEADS, 1, 1)]),
        (["mlp"], "granitemoe", [(6, 4, 2)]),
        (["hidden"], "llama", []),
    ],
)
def test_choosing_takes_moments_and_an_order_of_each_writer(
    cut: list[str], family: str, each: list[tuple[int, int, int]], known_time: float
) -> None:
    reading = Reading(rotation=10, refit=100, layers=10)
    about = checked(*cut, family=family)
    without = seconds(ToDo(reading=reading), checked())
    flops = sum(2 * 100 * routed * width**2 + ORDERING_FLOPS * experts * width**3 for width, experts, routed in each)
    of_base = cost_of(
        build_skeleton(about.base_config, torch.bfloat16), usual_context(about.base_config)
    ).prefill_flops_per_token
    expected = 2 * flops / of_base * READING_SECONDS
    assert seconds(ToDo(reading=reading), about) - without == pytest.approx(expected)


@pytest.mark.parametrize(
    ("todo", "comparisons", "scorings"),
    [
        (ToDo(), TUNED + SMALL, TUNED + SMALL),  # of the written model with the tuned one
        (ToDo(compacts=True), 1 + SMALL + TUNED + SMALL, TUNED + SMALL),  # and of the small with the masked one
        (ToDo(goes_small=False), WITH_ADAPTER + SMALL, WITH_ADAPTER + SMALL),
    ],
)
def test_comparing_and_scoring_are_reckoned_with(
    todo: ToDo, comparisons: float, scorings: float, known_time: float
) -> None:
    compared = COMPARING * comparisons * NUM_VERIFIED * READING_SECONDS
    assert seconds(todo, of=data(40_000)) == pytest.approx(compared + 40_000 * scorings * READING_SECONDS)
    with_base = seconds(replace(todo, measures_base=True), of=data(40_000)) - seconds(todo, of=data(40_000))
    assert with_base == pytest.approx(40_000 * READING_SECONDS + ANSWERING)


@pytest.mark.parametrize(("each", "lengths"), [(1e-4, [8, 8, 4, 4, 100, 100, 1, 1]), (1.0, [8, 1])])
def test_a_short_a_middle_and_a_long_batch_are_timed_while_that_is_quick(
    each: float, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is read twice, the second time counts; where a pass takes long the middle one alone is read, once."""
    now, seen = [0.0], []

    class Model(nn.Module):
        device = torch.device("cpu")

        def get_input_embeddings(self) -> nn.Module:
            return nn.Embedding(2, 1)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            assert input_ids.max() <= 1  # of its own vocabulary, whatever the data's is
            now[0] += each * input_ids.numel() * (2 if each < 1 and seen[-1:] != [input_ids.numel()] else 1)
            seen.append(input_ids.numel())
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 1))

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    of = data()
    of.train = Dataset.from_list([{"input_ids": [9] * length, "labels": [1] * length} for length in (100, 4, 8, 8)])
    batches = [[(0, 100)], [(1, 4)], [(2, 8)], [(1, 4)]]
    found = speed.time_base(arguments(), of, Model(), batches)
    assert (found.training, found.reading, found.writing) == pytest.approx((each, each, each))
    assert seen == lengths


def test_what_is_read_is_told_apart() -> None:
    given = arguments()
    expected = Reading(DEFAULT_TOKENS_PER_CHANNEL * 48, TOKENS_PER_CHANNEL * HEADS, LAYER_TOKENS)
    said, reading = _reading(given, checked("hidden", "mlp", "heads", "layers"), math.inf)
    assert reading == expected and f" {TOKENS_PER_CHANNEL * HEADS:,} tokens, and the rest" in said
    assert _reading(given, checked("mlp"), math.inf)[1] == Reading(refit=TOKENS_PER_CHANNEL * 6)
    asked = arguments(calibration_tokens=7, refit_tokens=5)
    assert _reading(asked, checked("hidden", "mlp"), math.inf)[1] == Reading(7, 5, 0)


def test_stages_without_steps_are_not_spoken_of() -> None:
    assert _stages(0, 9, True) == "all on the small model"
    assert _stages(2, 9, False) == "2 with a soft mask and 7 at full width"


def test_no_more_tokens_are_announced_than_there_are() -> None:
    said, _ = _reading(arguments(), checked("mlp", "layers"), 90)
    assert "All 90 tokens of the data are read first, to choose the MLP channels." in said
    assert "All 90 tokens of the data are read 2 times" in said


def test_what_is_done_is_not_expected_again(tmp_path: Path) -> None:
    reading = Reading(1000, 20, 3)

    def left(checkpoint: Path | None, kind: str = "PAT", step: int = 0) -> ToDo:
        if checkpoint is not None:
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
            (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        start = Start(None if checkpoint is None else str(checkpoint))
        return ToDo.of(start, 4, 10, reading, goes_small=True, measures_base=False)

    assert left(None) == ToDo(4, 6, reading, goes_small=True, compacts=True)
    assert left(tmp_path / "a", step=3) == ToDo(1, 6, Reading(refit=20), goes_small=True, compacts=True, done_share=0.3)
    assert left(tmp_path / "a", step=4) == ToDo(0, 6, Reading(), goes_small=True, compacts=True, done_share=0.4)
    assert left(tmp_path / "a", "LORA", 7) == ToDo(0, 3, Reading(), goes_small=True, compacts=False, done_share=0.7)
    trained = ToDo.of(Start(is_trained=True), 4, 10, reading, goes_small=True, measures_base=True)
    assert trained == ToDo(measures_base=True)


@pytest.mark.parametrize(
    ("flags", "times"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, 5),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, 4 * 10 / 40),  # of the 40 steps of the run 30 are done
        ({"eval_strategy": "epoch", "per_device_train_batch_size": 60}, 10 * 60 / len(LENGTHS)),
    ],
)
def test_evaluations_on_the_way_are_reckoned_with(flags: dict[str, Any], times: float, known_time: float) -> None:
    of = data()
    of.evaluation = [{"input_ids": [1] * 700}]
    todo = ToDo(soft_steps=5, small_steps=5, done_share=0.75)
    width = WITH_ADAPTER * (1 + SMALL) / 2
    more = seconds(todo, of=of, **flags) - seconds(todo, **flags)
    assert more == pytest.approx(times * width * 700 * SECONDS_PER_TOKEN)
    assert seconds(ToDo(), of=of, **flags) == seconds(ToDo(), **flags)


def test_a_step_has_a_duration_of_its_own(known_time: float) -> None:
    todo = ToDo(soft_steps=4, small_steps=4, reading=Reading(refit=100), measures_base=True)
    given = arguments(per_device_train_batch_size=4, gradient_checkpointing=False)
    found = expect(given, checked(), data(40), None, todo)
    assert found.step_seconds == pytest.approx(known_time * PASSES * (1 + SMALL) / 2)
    assert (
        found.rest == pytest.approx(found.seconds - found.step_seconds * (todo.soft_steps + todo.small_steps))
        and found.rest > 0
    )
    assert not expect(given, checked(), data(), None, ToDo()).step_seconds
    assert [step_span(value) for value in (0.5, 1, 4, 200)] == [
        "less than a second a step",
        "1 to 2 seconds a step",
        "3 to 6 seconds a step",
        "2 to 5 minutes a step",
    ]


def test_a_duration_is_a_range_in_words() -> None:
    assert [span(value) for value in (20, 60, 300, 20_000)] == [
        "less than a minute",
        "1 to 2 minutes",
        "4 to 8 minutes",
        "4 to 8 hours",
    ]
