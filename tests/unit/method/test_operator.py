"""The operators D: identity at the start, their formula, their transpose, and gradients by finite differences."""

import pytest
import torch
from torch import Tensor, nn

from pat.errors import PatError
from pat.method.operator import DenseOperator, LowRankOperator, build_operator, default_rank

HIDDEN, RANK = 8, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def trained(operator: nn.Module) -> nn.Module:
    operator.double()
    with torch.no_grad():
        for index, parameter in enumerate(operator.parameters()):
            parameter.copy_(random(*parameter.shape, seed=index + 1))
    return operator


def matrix(operator: nn.Module) -> Tensor:
    """D written out from equation 4, entry by entry."""
    if isinstance(operator, DenseOperator):
        return torch.eye(HIDDEN, dtype=torch.float64) + operator.matrix.detach()
    l0, l1 = operator.down.detach(), operator.up.detach()
    v = operator.lr_multiplier * operator.scale.detach()
    d = torch.eye(HIDDEN, dtype=torch.float64)
    for i in range(HIDDEN):
        for j in range(HIDDEN):
            d[i, j] += sum(l1[i, k] * v[k] * l0[k, j] for k in range(RANK))
    return d


OPERATORS = [
    lambda: LowRankOperator(HIDDEN, RANK),
    lambda: LowRankOperator(HIDDEN, RANK, lr_multiplier=7.0),
    lambda: DenseOperator(HIDDEN),
]


@pytest.mark.parametrize("make", OPERATORS)
def test_a_fresh_operator_is_the_identity_bit_for_bit(make) -> None:
    operator, y = make(), torch.randn(5, HIDDEN)
    assert torch.equal(y + operator.change(y), y)
    assert torch.equal(y + operator.change_transposed(y), y)


def test_a_fresh_low_rank_operator_satisfies_the_identity_loss() -> None:
    operator = LowRankOperator(64, 16)
    for gram in (operator.down @ operator.down.mT, operator.up.mT @ operator.up):
        torch.testing.assert_close(gram, torch.eye(16), atol=1e-6, rtol=0)
    assert not operator.scale.any()
    assert operator.identity_loss().item() < 3e-4  # twice sqrt(1e-8), and float32 rounding


def test_operators_differ_from_each_other_at_the_start() -> None:
    """With equal factors the operators of all writers would get equal directions."""
    first, second = LowRankOperator(16, 4), LowRankOperator(16, 4)
    assert not torch.allclose(first.down, second.down)
    assert not torch.allclose(first.down, first.up.mT)


@pytest.mark.parametrize("make", OPERATORS)
def test_change_is_d_minus_identity_and_its_transpose(make) -> None:
    operator, y = trained(make()), random(2, 5, HIDDEN, seed=9)
    d = matrix(operator)
    torch.testing.assert_close(y + operator.change(y), torch.einsum("ij,btj->bti", d, y), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        y + operator.change_transposed(y), torch.einsum("ji,btj->bti", d, y), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("make", OPERATORS)
def test_adding_the_change_in_place_and_cutting_it_beforehand(make) -> None:
    operator, y, total = trained(make()).requires_grad_(False), random(5, HIDDEN, seed=9), random(5, HIDDEN, seed=10)
    d, keep = matrix(operator), torch.tensor([0, 3, 5])
    expected = total + y @ (d - torch.eye(HIDDEN)).mT
    short = operator.cut_outputs(lambda rows: rows[..., keep])
    part = total[:, keep].clone()
    assert operator.add_change(total, y) is total
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)
    assert short.add_change(part, y) is part
    torch.testing.assert_close(part, expected[:, keep], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(short.change(y), (y @ (d - torch.eye(HIDDEN)).mT)[:, keep], atol=1e-12, rtol=1e-12)
    assert operator.change(y).shape == y.shape  # the operator itself is as it was
    assert not list(make().cut_outputs(lambda rows: rows).parameters())[-1].requires_grad


@pytest.mark.parametrize("make", OPERATORS)
def test_gated_is_the_gate_times_d(make) -> None:
    operator, y, gate = trained(make()), random(2, 5, HIDDEN, seed=9), random(HIDDEN, seed=11)
    expected = gate * torch.einsum("ij,btj->bti", matrix(operator), y)
    torch.testing.assert_close(operator.gated(y, gate), expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda m: operator.gated(y, m), gate.requires_grad_())
    fresh, ones = make(), torch.ones(HIDDEN)
    assert torch.equal(fresh.gated(y.float(), ones), y.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPERATORS)
def test_gated_under_autocast_keeps_the_streams_dtype(make, dtype: torch.dtype) -> None:
    operator, y = trained(make()).float(), random(2, 5, HIDDEN, seed=9).to(dtype)
    gate = random(HIDDEN, seed=11).float()
    with torch.autocast("cpu", torch.bfloat16):
        result = operator.gated(y, gate)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), operator.gated(y.float(), gate), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("method", ["change", "change_transposed", "gated"])
@pytest.mark.parametrize("name", ["down", "scale", "up", "y"])
def test_gradients_by_finite_differences(name: str, method: str) -> None:
    operator, y = trained(LowRankOperator(HIDDEN, RANK)), random(2, HIDDEN, seed=9)
    point = (y if name == "y" else getattr(operator, name)).detach().clone().requires_grad_()

    gate = (random(HIDDEN, seed=11),) if method == "gated" else ()

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.operator = operator

        def forward(self, y: Tensor) -> Tensor:
            return getattr(operator, method)(y, *gate)

    def function(value: Tensor) -> Tensor:
        if name == "y":
            return getattr(operator, method)(value, *gate)
        return torch.func.functional_call(Call(), {f"operator.{name}": value}, (y,))

    assert torch.autograd.gradcheck(function, point)


def test_the_multiplier_moves_v_that_many_times_faster_under_adam() -> None:
    for multiplier in (1.0, 7.0):
        operator = build_operator(HIDDEN, RANK, lr_multiplier=multiplier)
        optimizer = torch.optim.Adam(operator.parameters(), lr=1e-3)
        operator.change(torch.randn(5, HIDDEN)).sum().backward()
        optimizer.step()
        torch.testing.assert_close(operator.v().abs(), torch.full((RANK,), multiplier * 1e-3), rtol=1e-3, atol=0)


def test_at_the_start_only_the_scale_has_a_gradient() -> None:
    """v = 0 shields L0 and L1 from the task's gradient, not v itself."""
    operator = LowRankOperator(HIDDEN, RANK)
    operator.change(torch.randn(5, HIDDEN)).square().sum().backward()
    assert not operator.scale.grad.any()  # of a quadratic at its minimum
    operator.zero_grad()
    operator.change(torch.randn(5, HIDDEN)).sum().backward()
    assert operator.scale.grad.any()
    assert not operator.down.grad.any() and not operator.up.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_stay_float32_and_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    for make in OPERATORS:
        operator = make()
        assert operator.change(torch.randn(2, HIDDEN).to(dtype)).dtype == dtype
        assert {p.dtype for p in operator.parameters()} == {torch.float32}


def test_build_operator() -> None:
    assert build_operator(40, None).scale.shape == (2,)  # 5 %
    assert build_operator(40, None).lr_multiplier == LowRankOperator(40, 2).lr_multiplier == 1
    # From 160 channels on multiples of 8: the paper's 200 of 4096, SmolLM2's 29 of 576.
    assert [default_rank(size) for size in (158, 160, 576, 1024, 4096)] == [8, 8, 32, 48, 208]
    assert build_operator(8, None).scale.shape == (1,)
    assert build_operator(40, 7).scale.shape == (7,)
    assert build_operator(40, 40).scale.shape == (40,)
    assert build_operator(40, "dense").matrix.shape == (40, 40)


@pytest.mark.parametrize("rank", [0, -1, 41, "full", True])
def test_an_impossible_rank_is_refused(rank) -> None:
    with pytest.raises(PatError, match="operator_rank"):
        build_operator(40, rank)


@pytest.mark.parametrize("rank", [1, 3])
def test_parameters_can_be_viewed_as_bytes(rank: int) -> None:
    """DeepSpeed views them so to send them to other processes; a column that keeps the stride of a row fails."""
    for parameter in LowRankOperator(8, rank).parameters():
        assert parameter.data.view(torch.uint8).shape[-1] == 4 * parameter.shape[-1]
