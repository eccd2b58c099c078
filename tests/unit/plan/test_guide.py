"""The guide of `pat plan`: figures that are on record, and times that follow from data sheets."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pat.plan.guide import HARDWARE, MEASURED_CUTS, MeasuredCut, training_times
from pat.surgery.costs import GroupSize, ModelCost
from pat.tuner.memory import TrainingMemory

COMPARISONS = Path(__file__).resolve().parents[3] / "docs" / "comparisons"


def recorded(*folders: str) -> dict[tuple[str, float], dict[int, dict[str, Any]]]:
    """The last cell of each method and ratio, by seed."""
    found: dict[tuple[str, float], dict[int, dict[str, Any]]] = defaultdict(dict)
    for name in folders:
        for line in (COMPARISONS / name / "results.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            cell = row["cell"]
            if not cell["search"] and (name != "axes" or cell["model"] == "stories260K"):
                found[cell["method"], cell["ratio"]][cell["seed"]] = row
    return found


def loss(cells: dict[int, dict[str, Any]]) -> float:
    return mean(row["held_out_nll"] for row in cells.values())


@pytest.mark.parametrize("cut", MEASURED_CUTS, ids=lambda cut: f"{cut.model}-{cut.pruning_ratio}-{cut.num_tokens}")
def test_what_a_cut_has_cost_is_on_record(cut: MeasuredCut) -> None:
    base = 2.1011  # the untuned SmolLM2, of which `axes` has the cell
    if cut.model == "stories260K":
        cells = recorded("axes")
        base = loss(cells["base", 0.0])
        # The cells do not say how many tokens they are of; these have the same rows and steps.
        counted = recorded("milestone")["pat_milestone_fiftieth", 0.25]
    else:
        cells = recorded("smollm2-axes" if cut.num_tokens < 200_000 else "smollm2-300k")
        counted = cells["pat", 0.25]
    small = cells["pat", cut.pruning_ratio]
    assert len(small) == cut.num_seeds
    assert cut.above_base == pytest.approx(loss(small) - base, abs=6e-4)
    assert cut.num_tokens == pytest.approx(mean(row["train_tokens"] for row in counted.values()), abs=1)
    assert small.keys() == cells["lora", 0.0].keys()
    assert cut.above_lora == pytest.approx(loss(small) - loss(cells["lora", 0.0]), abs=6e-4)


def test_times_follow_from_flops_and_memory() -> None:
    groups = {"embedding": GroupSize(10**9, 2 * 10**9)}
    base = cast(ModelCost, SimpleNamespace(prefill_flops_per_token=12e9, groups=groups, tied=True))
    small = cast(ModelCost, SimpleNamespace(prefill_flops_per_token=5e9, groups=groups, tied=True))
    room = TrainingMemory(4, 512, 0, 0, 0, 0, 0, 0, total_bytes=30 * 10**9, checkpointed_total_bytes=20 * 10**9)
    times = {time.hardware.name: time for time in training_times(base, (small,), room)}
    assert times.keys() == {hardware.name for hardware in HARDWARE}
    # (12 + 2) GFLOP forwards and as many backwards for a token, of 312 TFLOP/s at 35 %
    assert times["A100 80GB"].base_seconds == pytest.approx(2 * 14e15 / (312e12 * 0.35))
    assert times["A100 80GB"].small_seconds == pytest.approx((2 * 7e15 / (312e12 * 0.35),))
    assert times["L4"].gradient_checkpointing and times["L4"].base_seconds == pytest.approx(3 * 14e15 / (121e12 * 0.35))
    assert times["L4"].fits and not times["T4"].fits and not times["A100 80GB"].gradient_checkpointing
    tight = replace(room, checkpointed_total_bytes=30 * 10**9)
    assert [time.hardware.name for time in training_times(base, (), tight) if time.fits] == ["A100 80GB", "H100"]
