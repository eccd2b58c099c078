"""Shapes that are cut and scored, and the base between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from pat.loading import load_config
from pat.plan import scorer
from pat.plan.command import run_plan
from pat.plan.options import PlanOptions

TESTS = Path(__file__).parents[2]
STORIES, DATA = TESTS / "data" / "stories260K", TESTS / "data" / "instructions.jsonl"


def test_the_base_is_the_same_after_every_point_and_no_row_serves_twice() -> None:
    config, family = load_config(str(STORIES))
    measuring = scorer.ShapeScorer(str(STORIES), str(DATA), config, family)
    scored = {tuple(row["input_ids"]) for row in measuring.scored}
    assert scored.isdisjoint(tuple(row["input_ids"]) for row in measuring.rows)
    before = measuring.nll({})
    for sizes in ({"pruned_hidden_size": 48}, {"pruned_intermediate_size": 96}, {"pruned_num_hidden_layers": 4}):
        assert measuring.nll(sizes) > before
        assert measuring.nll({}) == before


def test_the_time_that_is_left_never_grows_where_measurements_take_what_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, family = load_config(str(STORIES))
    measuring, state = scorer.ShapeScorer(str(STORIES), str(DATA), config, family), scorer.Phase("", "shapes")
    passed, left = 0.0, list[float]()

    def nll(self: scorer.ShapeScorer, sizes: dict[str, int]) -> float:
        nonlocal passed
        if state.share is not None:
            left.append(passed * (1 - state.share) / state.share)
        passed += self.work(sizes)
        self.num_scored = 1
        return 2.0 + 0.1 * len(sizes)

    monkeypatch.setattr(scorer.ShapeScorer, "nll", nll)
    measuring.run(0.25, state)
    assert left == sorted(left, reverse=True) and len(left) >= 10
    assert state.share == 1.0 and state.done == state.total == len(left) + 1


@pytest.mark.parametrize(
    "target", [{"target_num_parameters": 200_000}, {"target_bytes": "800KB"}, {"target_latency": 0.8}]
)
def test_what_exceeds_the_target_is_no_candidate(target: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def nll(self: scorer.ShapeScorer, sizes: dict[str, int]) -> float:
        self.num_scored = 1
        return 2.0 + (self.ratio(sizes) if sizes else 0.0)  # the less is cut, the better

    monkeypatch.setattr(scorer.ShapeScorer, "nll", nll)
    config, family = load_config(str(STORIES))
    planned = run_plan(PlanOptions(model_name_or_path=str(STORIES), **target))
    measuring = scorer.ShapeScorer(str(STORIES), str(DATA), config, family, target)
    measuring.run(planned.candidates[0].pruning_ratio, scorer.Phase("", "shapes"))
    found = measuring.measured()
    assert found.default == {"pruned_intermediate_size": planned.candidates[0].shape.pruned("mlp")}
    assert sum(len(point.sizes) == 2 for point in found.candidates) == scorer.NUM_PAIRS
    for point in found.candidates:
        record = run_plan(PlanOptions(model_name_or_path=str(STORIES), **cast(Any, point.sizes)))
        (small,) = record.candidates
        if "target_latency" in target:
            assert small.cost.prefill_flops_per_token <= 0.8 * record.base.prefill_flops_per_token
        else:
            assert small.cost.total.num_parameters <= 200_000
