"""A plan recommends a shape, with its command."""

from __future__ import annotations

from typing import Any

import pytest

from pat.plan.curves import Measured, Point
from pat.plan.options import PlanOptions
from pat.plan.recommend import recommend

A, B = {"pruned_intermediate_size": 104}, {"pruned_hidden_size": 56}


@pytest.mark.parametrize(("error", "taken"), [(0.06, A), (0.04, B), (None, A)])
def test_the_default_is_recommended_unless_another_shape_is_seen_to_be_better(
    error: float | None, taken: dict[str, int]
) -> None:
    options = PlanOptions(model_name_or_path="base", calibrate="my data.jsonl")
    found = Measured(
        "data.jsonl", 8000, 2000, 4.0, {}, (Point(B, 0.25, 4.4), Point(A, 0.25, 4.5, best_error=error)), default=A
    )
    said = recommend(options, [0.25], found)
    (flags,) = [f"--{name} {size}" for name, size in taken.items()]
    assert (
        f"pat tune --model_name_or_path base --dataset_name 'my data.jsonl' {flags} --output_dir out"
        == said.splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("asked", "ratios", "flags", "words"),
    [
        ({}, [0.25], "--pruning_ratio 0.125", "an eighth to begin with, --pruning_ratio 0.125; cut more"),
        (
            {"pruning_ratio": [0.25]},
            [0.25],
            "--pruning_ratio 0.25",
            "this shape, 25.0 % cut, which the command asks for, if you need a model of this size; else begin with an "
            "eighth, --pruning_ratio 0.125, and cut more",
        ),
        ({"vocabulary_size": 900}, [0.25], "--pruning_ratio 0.25 --vocabulary_size 900", "which the command asks for"),
        (
            {"pruning_ratio": [0.25, 0.125]},
            [0.251, 0.126],
            "--pruning_ratio 0.125",
            "the smallest of these cuts, 12.6 %",
        ),
        (
            {"target_bytes": "100MB"},
            [0.4],
            "--target_bytes 100MB",
            "the shape that --target_bytes 100MB asks for, 40.0 % cut. Training",
        ),
        (
            {"pruned_hidden_size": 48},
            [0.25],
            "--pruned_hidden_size 48",
            "--pruning_ratio 0.125 instead of --pruned_hidden_size 48, and cut more",
        ),
        (
            {"pruned_num_hidden_layers": 20, "vocabulary_size": 900},
            [0.1],
            "--pruned_num_hidden_layers 20 --vocabulary_size 900",
            "this shape, 10.0 % cut. Training has to make up for the cut: with 25 % of its parameters cut, SmolLM2",
        ),
    ],
)
def test_without_data_the_smallest_cut_is_recommended(
    asked: dict[str, Any], ratios: list[float], flags: str, words: str
) -> None:
    said = recommend(PlanOptions(model_name_or_path="base", **asked), ratios, None)
    assert f"pat tune --model_name_or_path base --dataset_name DATA {flags} --output_dir out" == said.splitlines()[-1]
    assert words in said and "yours is not measured" in said
    if "cut more" in words:
        assert "by more than the standard error" in said and "general text has not risen much" in said


@pytest.mark.parametrize("ratio", [0.5, 0.6])
def test_more_than_half_is_recommended_with_the_caution_that_tuning_gives(ratio: float) -> None:
    point = Point(A, ratio, 4.5)
    seen = Measured("data.jsonl", 8000, 2000, 4.0, {}, (point,), default=A)
    target = PlanOptions(model_name_or_path="base", target_bytes="300KB")
    for options, measured in (
        (PlanOptions(model_name_or_path="base", pruning_ratio=[ratio]), None),
        (target, None),
        (target, seen),
    ):
        said = recommend(options, [ratio], measured)
        assert ("A cut of 60 % of the parameters is more than has been shown to work" in said) == (ratio > 0.5)
