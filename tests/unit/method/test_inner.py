"""The gate inside a branch: soft like any gate, and filling in for what it drops once it is hard."""

from __future__ import annotations

import pytest
import torch

from pat.method.gate import Gate
from pat.method.inner import InnerGate

SIZE, KEPT = 7, 4


def hard_gate(*, refits: bool = True) -> InnerGate:
    gate = InnerGate(SIZE, KEPT, refits=refits)
    gate.set_prior(torch.tensor([-1.0, 2.0, -0.5, 3.0, 1.0, -2.0, 0.5]))
    gate.set_step(0, 0)
    return gate


def test_a_soft_gate_is_a_gate() -> None:
    inner, plain = InnerGate(SIZE, KEPT), Gate(SIZE, KEPT)
    y = torch.randn(2, SIZE)
    assert torch.equal(inner(y), y)
    for gate in (inner, plain):
        gate.weight.data.copy_(torch.linspace(-1, 1, SIZE))
        gate.set_step(3, 10)
    assert torch.equal(inner(y), plain(y)) and not torch.equal(inner(y), y)


def test_a_hard_gate_fills_in_what_it_drops() -> None:
    gate = hard_gate()
    assert gate.keep_indices.tolist() == [1, 3, 4, 6]
    matrix = torch.randn(SIZE - KEPT, KEPT)
    gate.set_reconstruction(matrix)
    y = torch.randn(5, 3, SIZE, dtype=torch.float64)
    expected = y.clone()
    for row, channel in enumerate((0, 2, 5)):
        expected[..., channel] = sum(float(matrix[row, i]) * y[..., kept] for i, kept in enumerate((1, 3, 4, 6)))
    torch.testing.assert_close(gate(y), expected, atol=1e-12, rtol=0)
    assert gate(y.bfloat16()).dtype == torch.bfloat16


def test_an_entry_of_several_channels_goes_whole() -> None:
    gate = InnerGate(3, 2, width=2)
    gate.set_prior(torch.tensor([1.0, -1.0, 2.0]))
    gate.weight.data.copy_(torch.tensor([0.5, -0.5, 0.0]))
    y = torch.randn(4, 6)
    gate.set_step(2, 10)
    assert torch.equal(gate(y), y * gate.values().repeat_interleave(2))
    gate.set_step(10, 10)
    assert (
        gate.keep.tolist() == [True, False, True]
        and gate.kept_channels.tolist() == [True] * 2 + [False] * 2 + [True] * 2
    )
    matrix = torch.randn(2, 4)
    gate.set_reconstruction(matrix)
    kept = y[:, [0, 1, 4, 5]]
    torch.testing.assert_close(gate(y), torch.cat([kept[:, :2], kept @ matrix.mT, kept[:, 2:]], dim=1))


@pytest.mark.parametrize("refits", [True, False])
def test_without_a_fit_channels_are_dropped(refits: bool) -> None:
    gate, y = hard_gate(refits=refits), torch.randn(3, SIZE)
    assert gate.awaits_refit == refits
    assert torch.equal(gate(y), y * gate.keep)


def test_a_fit_is_awaited_once_the_gate_is_hard() -> None:
    assert not InnerGate(SIZE, KEPT).awaits_refit
    gate = hard_gate()
    gate.set_reconstruction(torch.ones(SIZE - KEPT, KEPT))
    assert not gate.awaits_refit
    assert not InnerGate(SIZE, SIZE).awaits_refit


def test_its_state_is_saved_and_loaded_whole() -> None:
    gate, again = hard_gate(), InnerGate(SIZE, KEPT)
    gate.set_reconstruction(torch.randn(SIZE - KEPT, KEPT))
    again.load_state_dict(gate.state_dict())
    y = torch.randn(4, SIZE)
    assert torch.equal(again(y), gate(y)) and again.hardened


def test_proxy_weights_stay_in_the_graph() -> None:
    gate = hard_gate()
    gate(torch.randn(2, SIZE)).sum().backward()
    assert torch.equal(gate.weight.grad, torch.zeros(SIZE))
