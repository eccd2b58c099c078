"""Folding a few rows at a time, in another precision, rounded to another dtype: the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from tiny_models import build
from torch import Tensor

from pat.families import get_family
from pat.method.operator import LowRankOperator
from pat.surgery import fold
from pat.surgery.adapted import AdaptedMatrix, merged
from pat.surgery.fold import Channels, HeadPlan, fold_weights
from pat.surgery.residual import map_residual_stream

HIDDEN, KEPT = 48, 36

EXACT = 1e-14
"""float64, other blocks of the same sums."""

SINGLE = 1e-5
"""float32 against float64 at weights of size one: sums of at most 80 products."""


def folded(
    family: str,
    rotated: bool,
    precision: torch.dtype,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor | AdaptedMatrix] | None = None,
) -> dict[str, Tensor]:
    model = build(family, tied=False)
    weights = weights or {name: parameter.detach() for name, parameter in model.named_parameters()}
    stream = map_residual_stream(get_family(family), weights, tied=False)
    generator = torch.Generator().manual_seed(0)
    keep = torch.zeros(HIDDEN, dtype=torch.bool)
    keep[torch.randperm(HIDDEN, generator=generator)[:KEPT]] = True
    basis = None
    if rotated:
        basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64, generator=generator)).Q
    operators = {}
    for site in stream.sites:
        operator = LowRankOperator(HIDDEN, 6).to(precision).requires_grad_(False)
        for parameter in operator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        operators[site] = operator
    channels = Channels.from_mask(keep, basis)
    plan = HeadPlan(tied=False, embedding_ratio=1.1)
    return dict(fold_weights(stream, weights.__getitem__, channels, operators, plan, precision=precision, dtype=dtype))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_few_rows_at_a_time_is_the_same(family: str, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folded(family, rotated, torch.float64)
    monkeypatch.setattr(fold, "CHUNK_ELEMENTS", 7 * HIDDEN)  # no divisor of any number of rows there is
    pieces = folded(family, rotated, torch.float64)
    assert whole.keys() == pieces.keys()
    for name, weight in whole.items():
        assert pieces[name].is_contiguous()
        torch.testing.assert_close(pieces[name], weight, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rotated", [False, True])
def test_lora_is_added_to_the_rows_that_are_folded(rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "CHUNK_ELEMENTS", 7 * HIDDEN)
    generator = torch.Generator().manual_seed(1)

    def adapted(weight: Tensor) -> AdaptedMatrix:
        up, down = (torch.randn(*shape, generator=generator) for shape in ((len(weight), 3), (3, weight.shape[1])))
        return AdaptedMatrix(weight, up.double(), down.double(), scaling=0.3)

    stored = {name: parameter.detach() for name, parameter in build("llama", tied=False).named_parameters()}
    apart = {name: adapted(weight) if weight.dim() == 2 else weight for name, weight in stored.items()}
    together = {name: merged(weight).double() for name, weight in apart.items()}
    results = [folded("llama", rotated, torch.float64, weights=weights) for weights in (apart, together)]
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=EXACT, atol=10 * EXACT)


@pytest.mark.parametrize("rotated", [False, True])
def test_results_are_rounded_once(rotated: bool) -> None:
    exact = folded("llama", rotated, torch.float64)
    for name, weight in folded("llama", rotated, torch.float64, torch.bfloat16).items():
        assert torch.equal(weight, exact[name].bfloat16()), name


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_folding_in_float32_is_off_by_its_rounding(family: str, rotated: bool) -> None:
    exact, single = folded(family, rotated, torch.float64), folded(family, rotated, torch.float32)
    assert {weight.dtype for weight in single.values()} == {torch.float32}
    errors = [(single[name].double() - weight).abs().max().item() for name, weight in exact.items()]
    assert 1e-9 < max(errors) < SINGLE
