"""The guide of `pat plan`: figures that are on record, and times that follow from data sheets."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pat.plan.guide import HARDWARE, MEASURED_CUTS, training_times
from pat.surgery.costs import GroupSize, ModelCost
from pat.tuner.memory import TrainingMemory

COMPARISONS = Path(__file__).resolve().parents[3] / "docs" / "comparisons"


def recorded() -> dict[tuple[str, str, float], dict[int, dict[str, Any]]]:
    """The last cell of each method, model and ratio, by seed."""
    found: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = defaultdict(dict)
    for name in ("axes", "milestone", "smollm2-axes"):
        for line in (COMPARISONS / name / "results.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            cell = row["cell"]
            is_todays = name == "milestone" and cell["method"] == "pat"  # at 0; the guide has those at 0.02
            is_short = (name, cell["model"]) == ("axes", "smollm2") and cell["method"] != "base"
            if not (cell["search"] or is_todays or is_short):
                found[cell["method"], cell["model"], cell["ratio"]][cell["seed"]] = row
    return found


@pytest.mark.parametrize("cut", MEASURED_CUTS, ids=lambda cut: f"{cut.model}-{cut.pruning_ratio}")
def test_what_a_cut_has_cost_is_on_record(cut: Any) -> None:
    cells, model = recorded(), "stories260K" if cut.model == "stories260K" else "smollm2"
    small, lora = cells["pat", model, cut.pruning_ratio], cells["lora", model, 0.0]
    (base,) = cells["base", model, 0.0].values()
    loss = mean(row["held_out_nll"] for row in small.values())
    assert len(small) == cut.num_seeds and small.keys() <= lora.keys()
    assert cut.above_lora == pytest.approx(loss - mean(lora[seed]["held_out_nll"] for seed in small), abs=6e-4)
    assert cut.above_base == pytest.approx(loss - base["held_out_nll"], abs=6e-4)
    # The older cells do not say; these have the same rows and steps.
    same = "pat_milestone_fiftieth" if model == "stories260K" else "pat"
    assert cut.num_tokens == pytest.approx(
        mean(row["train_tokens"] for row in cells[same, model, 0.25].values()), abs=1
    )


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
