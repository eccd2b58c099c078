"""The time of training on this CPU, from a layer and the head that are timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import KINDS, build

from pat.plan import cpu
from pat.plan.cpu import CpuTime, cpu_time
from pat.plan.guide import MILLION, head_flops
from pat.surgery.costs import build_skeleton, cost_of
from pat.tuner.memory import TrainingMemory

LENGTH = 16
MEMORY = TrainingMemory(4, LENGTH, 0, 0, 0, 0, 0, 0, total_bytes=10**6, checkpointed_total_bytes=10**6)


def timed(family: str, memory: TrainingMemory = MEMORY, **options: int) -> CpuTime:
    skeleton = build_skeleton(build(family, tied=True, **options).config, torch.bfloat16)
    base = cost_of(skeleton, LENGTH)
    before, names = torch.get_rng_state(), list(skeleton.shapes())
    found = cpu_time(skeleton, base, (replace(base, prefill_flops_per_token=0.0),), memory, shown=False)
    assert torch.equal(torch.get_rng_state(), before) and list(skeleton.shapes()) == names
    if found.fits:
        assert found.layer_flops_per_second and found.head_flops_per_second and found.base_seconds
        head = MILLION * head_flops(base) / found.head_flops_per_second
        layers = MILLION * base.prefill_flops_per_token / found.layer_flops_per_second
        assert found.base_seconds == pytest.approx(layers + head) and found.small_seconds == pytest.approx((head,))
    return found


@pytest.mark.parametrize("family", KINDS)
def test_families_of_every_kind_are_timed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SECONDS", 0.0)
    assert timed(family).num_threads == torch.get_num_threads()


def test_of_many_layers_alike_one_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built, shrink = [], cpu.shrink_config

    def shrink_config(*arguments: Any, **options: Any) -> Any:
        built.append(shrink(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(cpu, "shrink_config", shrink_config)
    timed("llama", num_hidden_layers=64)
    assert [config.num_hidden_layers for config in built] == [1]


def test_what_does_not_fit_into_the_containers_memory_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text(f"{10**6 + 10}\n", encoding="utf-8")
    monkeypatch.setattr(cpu, "CONTAINER_LIMIT", limit)
    num_bytes = 4 * build("llama", tied=True).num_parameters()
    tight = replace(MEMORY, base_bytes=num_bytes)
    assert timed("llama", tight).fits
    # The weights are trained in float32, which takes twice the bytes of a bfloat16 checkpoint.
    too_large = timed("llama", replace(tight, base_bytes=num_bytes // 2))
    assert not too_large.fits and too_large.base_seconds is None and too_large.small_seconds == ()
