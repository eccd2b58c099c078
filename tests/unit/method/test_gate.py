"""The gate: equation 6 with and without a prior, exact selection, its gradients, and its whole life by random walks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import hypothesis.strategies as st
import mpmath
import pytest
import safetensors.torch
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from pat.errors import PatError
from pat.method.basis import UnifiedMask
from pat.method.gate import Gate

SIZE, KEPT = 12, 8

FLOAT32_SIGMOID = 4e-7
"""Three float32 roundings of numbers up to 1.5 (product, sigmoid, sum); tau is rounded to float32 as well."""
FLOAT64 = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def make(weight: Tensor | None = None, *, double: bool = False, **options: Any) -> Gate:
    """A gate whose proxy weights w_M are `weight`."""
    gate = Gate(SIZE, KEPT, **options)
    if double:
        gate.double()
    if weight is not None:
        with torch.no_grad():
            gate.weight.copy_(weight / gate.lr_multiplier)
    return gate


def expected_value(w: float, p: float, step: int, s0: int) -> float:
    """Equations 6 to 8 and the prior's term, from the specification, in 50 digits."""
    with mpmath.workdps(50):
        tau = 1 / (1 - mpmath.log(step) / mpmath.log(s0)) if step >= 1 else mpmath.mpf(1)
        beta = mpmath.mpf(1) / 2 - mpmath.mpf(step) / s0 if 2 * step < s0 else mpmath.mpf(0)
        return float(1 / (1 + mpmath.exp(-tau * (w + (1 - 2 * beta) * p))) + beta)


# -- soft values (equation 6) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s0", "with_prior", "double"),
    [(1, True, True), (2, False, True), (4, True, False), (7, True, True), (40, False, False), (200, True, True)],
)
def test_soft_values_are_equation_6(s0: int, with_prior: bool, double: bool) -> None:
    w = random(SIZE, seed=1)
    p = 0.5 * random(SIZE, seed=2) if with_prior else torch.zeros(SIZE, dtype=torch.float64)
    for step in sorted({0, 1, s0 // 4, s0 // 2, s0 - 1}):
        if step >= s0:
            continue
        gate = make(w, double=double)
        if with_prior:
            gate.set_prior(p)
        gate.set_step(step, s0)
        # From the values that the gate holds, in its own dtype.
        pairs = zip(gate.weight.tolist(), gate.prior.tolist(), strict=True)
        expected = [expected_value(a, b, step, s0) for a, b in pairs]
        tau = 1 / (1 - math.log(max(step, 1)) / math.log(s0)) if s0 > 1 else 1.0
        # The exponent's rounding is multiplied by tau, which reaches 200 one step before a milestone of 200.
        tolerance = FLOAT64 * max(1, tau) if double else FLOAT32_SIGMOID * max(1, tau)
        got = gate.values().detach().double().tolist()
        assert got == pytest.approx(expected, abs=tolerance, rel=0), f"step {step}"


@pytest.mark.parametrize("s0", [1, 2, 40])
def test_at_step_zero_the_gate_is_exactly_one_whatever_the_prior(s0: int) -> None:
    gate, y = make(), torch.randn(3, SIZE)
    gate.set_prior(10 * random(SIZE))
    gate.set_step(0, s0)
    assert torch.equal(gate.values().detach(), torch.ones(SIZE))
    assert torch.equal(gate(y), y)


def test_a_gate_that_is_never_moved_is_at_step_zero_with_and_without_gradients() -> None:
    """Who trains a gate without a callback must not see another function as soon as gradients are off."""
    w = random(SIZE)
    gate, y = make(w), torch.randn(3, SIZE)
    torch.testing.assert_close(gate.values().double(), torch.sigmoid(w) + 0.5, atol=1e-6, rtol=0)
    with torch.no_grad():
        evaluated = gate(y)
    assert torch.equal(gate(y), evaluated)


def test_soft_values_are_not_clamped() -> None:
    gate = make(torch.full((SIZE,), 8.0, dtype=torch.float64))
    gate.set_step(1, 100)
    assert (gate.values() > 1.48).all()


@pytest.mark.parametrize("kind", ["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_output_keeps_the_dtype_and_the_state_stays_float32(dtype: torch.dtype, kind: str) -> None:
    gate, y = make(kind=kind), torch.randn(2, SIZE).to(dtype)
    for step in (1, 20):
        gate.set_step(step, 20)
        assert gate(y).dtype == dtype
        torch.testing.assert_close(gate(y).float(), (y * gate.values()).float(), atol=0.01, rtol=0.01)
    assert gate.prior.dtype == torch.float32


# -- pinned entries, and what equation 9 counts ------------------------------------------------------------------------


def test_pinned_entries_are_one_throughout_and_count_in_selection_not_in_the_active_loss() -> None:
    gate = make(-torch.arange(1, SIZE + 1, dtype=torch.float64))
    pinned = torch.zeros(SIZE, dtype=torch.bool)
    pinned[[9, 11]] = True
    gate.set_prior(torch.full((SIZE,), 0.01), pinned=pinned)
    for step in (0, 1, 5, 10, 19):
        gate.set_step(step, 20)
        assert torch.equal(gate.values()[pinned], torch.ones(2))
        assert (gate.values()[~pinned] < 1).all()
    assert gate.active_loss().item() == KEPT - 2  # no free entry is active, the two pinned ones are
    assert gate.num_active == 2
    gate.set_step(20, 20)
    assert gate.keep_indices.tolist() == [0, 1, 2, 3, 4, 5, 9, 11]
    assert gate.num_active == KEPT


def test_active_loss_and_count_are_of_proxy_weights_plus_prior() -> None:
    gate = make(torch.tensor([1.0, 1.0, -1.0, 0.0] * 3, dtype=torch.float64), lr_multiplier=5.0)
    assert gate.active_loss().item() == pytest.approx(KEPT - 6)
    assert gate.num_active == 6
    prior = torch.zeros(SIZE)
    prior[[2, 3, 6, 7]] = 1.5  # lifts four inactive entries over zero
    gate.set_prior(prior)
    assert gate.active_loss().item() == pytest.approx(10 - KEPT)
    assert gate.num_active == 10
    gate.active_loss().backward()
    assert torch.equal(gate.weight.grad, torch.full((SIZE,), 5.0))


# -- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-3.0, 0.0, 2.0])
def test_exactly_the_target_stays_wherever_the_proxy_weights_are(value: float) -> None:
    """All above zero, all below, all equal: the number is met, ties are broken by index."""
    gate = make(torch.full((SIZE,), value, dtype=torch.float64))
    assert gate.keep_indices.tolist() == list(range(SIZE))
    gate.set_step(5, 5)
    assert gate.keep_indices.tolist() == list(range(KEPT))


def test_ties_at_the_cut_are_broken_by_index_and_pinned_entries_come_first() -> None:
    w = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.float64)
    gate = make(w)
    gate.set_step(5, 5)
    assert gate.keep_indices.tolist() == [0, 1, 2, 3, 5, 7, 9, 11]
    pinned = torch.zeros(SIZE, dtype=torch.bool)
    pinned[[8, 10]] = True
    gate = make(w)
    gate.set_prior(torch.zeros(SIZE), pinned=pinned)
    gate.set_step(5, 5)
    assert gate.keep_indices.tolist() == [1, 3, 5, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("kind", ["trainable", "frozen"])
def test_a_milestone_at_step_zero_needs_a_prior(kind: str) -> None:
    gate = make(kind=kind)
    with pytest.raises(PatError, match=r"milestone at step 0.*no prior order"):
        gate.set_step(0, 0)
    assert not gate.hardened
    gate.set_prior(torch.zeros(SIZE))  # an order that orders nothing
    with pytest.raises(PatError, match="milestone at step 0"):
        gate.set_step(0, 0)
    gate.set_prior(torch.arange(SIZE).flip(0) - 5.5)
    gate.set_step(0, 0)
    assert gate.hardened and gate.keep_indices.tolist() == list(range(KEPT))


# -- gradients -------------------------------------------------------------------------------------------------------


def with_weight(gate: Gate, weight: Tensor, y: Tensor) -> Tensor:
    return torch.func.functional_call(gate, {"weight": weight}, (y,))


@pytest.mark.parametrize(("step", "lr_multiplier"), [(0, 1.0), (1, 40.0), (10, 1.0), (25, 40.0), (39, 1.0)])
def test_gradients_by_finite_differences(step: int, lr_multiplier: float) -> None:
    gate = make(double=True, lr_multiplier=lr_multiplier)
    pinned = torch.zeros(SIZE, dtype=torch.bool)
    pinned[3] = True
    gate.set_prior(0.1 * random(SIZE, seed=2), pinned=pinned)
    gate.set_step(step, 40)
    weight = (0.1 * random(SIZE, seed=4) / lr_multiplier).requires_grad_()
    y = random(2, SIZE, seed=3).requires_grad_()
    # Steps small against the width of the sigmoid, which is 1 / (tau * lr_multiplier) in raw weights.
    eps = 1e-6 / lr_multiplier
    assert torch.autograd.gradcheck(lambda w: with_weight(gate, w, y.detach()), weight, eps=eps)
    assert torch.autograd.gradcheck(lambda v: with_weight(gate, weight.detach(), v), y)
    (gradient,) = torch.autograd.grad(with_weight(gate, weight, y.detach()).sum(), weight)
    assert gradient.count_nonzero() == SIZE - 1  # training can start at step 0, and the pinned entry has none


def test_a_hard_gate_keeps_the_proxy_weights_in_the_graph_with_zero_gradient() -> None:
    gate = make(random(SIZE))
    gate.set_step(20, 20)
    gate(torch.randn(2, SIZE)).sum().backward()
    assert gate.weight.grad is not None and not gate.weight.grad.any()


# -- the frozen gate of the paper's ablation ---------------------------------------------------------------------------


def test_a_frozen_gate_attenuates_the_first_entries_linearly() -> None:
    gate = make(kind="frozen")
    assert torch.equal(gate.values(), torch.ones(SIZE))
    for step in (0, 1, 5, 10, 19):
        gate.set_step(step, 20)
        expected = [1 - step / 20] * (SIZE - KEPT) + [1.0] * KEPT
        assert gate.values().tolist() == pytest.approx(expected, abs=1e-7)
        assert gate.num_active == KEPT
    gate.set_step(20, 20)
    assert gate.values().tolist() == [0.0] * (SIZE - KEPT) + [1.0] * KEPT
    assert gate.active_loss().item() == 0
    assert not list(gate.parameters()) and torch.equal(gate.proxy_weights(), torch.zeros(SIZE))


def test_a_frozen_gate_attenuates_the_last_entries_of_an_order() -> None:
    gate = make(kind="frozen")
    gate.set_prior(torch.arange(SIZE).flip(0) - 3.5)
    gate.set_step(5, 20)
    assert gate.values().tolist() == pytest.approx([1.0] * KEPT + [0.75] * (SIZE - KEPT))


# -- what is saved -----------------------------------------------------------------------------------------------------


def test_the_only_parameter_are_the_proxy_weights_and_the_saved_names_stay() -> None:
    gate = make()
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    assert not gate.weight.any() and isinstance(gate, nn.Module) and gate.lr_multiplier == 1
    assert set(gate.state_dict()) == {"weight", "prior", "pinned", "keep", "progress"}
    assert set(UnifiedMask(4, 2, has_basis=True, has_head_factor=True).state_dict()) == {
        *("weight", "prior", "pinned", "keep", "progress"),
        *("basis", "head_factor"),
    }


def test_progress_is_saved_as_step_milestone_hardened_and_calibrated() -> None:
    gate = make()
    assert gate.progress.tolist() == [0, -1, 0, 0]
    gate.set_prior(random(SIZE))
    assert gate.progress.tolist() == [0, -1, 0, 1]
    gate.set_step(3, 7)
    assert gate.progress.tolist() == [3, 7, 0, 1]
    gate.set_step(9, 7)
    gate.set_step(11, 7)
    assert gate.progress.tolist() == [9, 7, 1, 1]  # when it was decided


# -- the whole life of a mask ------------------------------------------------------------------------------------------


class MaskLife(RuleBasedStateMachine):
    """Random orders of what happens to a mask, against a model of it in Python's own numbers."""

    @initialize(
        data=st.data(),
        size=st.integers(2, 8),
        kind=st.sampled_from(["trainable", "frozen"]),
        has_basis=st.booleans(),
        lr_multiplier=st.sampled_from([1.0, 40.0]),
    )
    def create(self, data: Any, size: int, kind: str, has_basis: bool, lr_multiplier: float) -> None:
        kept = data.draw(st.integers(1, size - 1))
        self.options: dict[str, Any] = {"kind": kind, "has_basis": has_basis, "lr_multiplier": lr_multiplier}
        self.mask = UnifiedMask(size, kept, **self.options)
        self.size, self.kept, self.kind = size, kept, kind
        self.w, self.p = [0.0] * size, [0.0] * size
        self.pinned: set[int] = set()
        self.q = torch.eye(size, dtype=torch.float64)
        self.calibrated = False
        self.step: int | None = None
        self.s0 = data.draw(st.integers(1, 12))
        self.hard: list[int] | None = None

    @rule(step=st.integers(0, 14))
    def move(self, step: int) -> None:
        self.mask.set_step(step, self.s0)
        if self.hard is None:
            self.step = step
            self.hard = self.best() if step >= self.s0 else None

    @rule(seed=st.integers(0, 99))
    def train(self, seed: int) -> None:
        if self.mask.weight is not None:
            with torch.no_grad():
                self.mask.weight.add_(random(self.size, seed=seed) / self.mask.lr_multiplier)
            self.w = [self.mask.lr_multiplier * value for value in self.mask.weight.tolist()]

    @precondition(lambda self: self.hard is None)
    @rule(seed=st.integers(0, 99), data=st.data())
    def calibrate(self, seed: int, data: Any) -> None:
        self.pinned = set(data.draw(st.lists(st.integers(0, self.size - 1), max_size=self.kept, unique=True)))
        pinned = torch.zeros(self.size, dtype=torch.bool)
        pinned[list(self.pinned)] = True
        basis = None
        if self.options["has_basis"]:
            basis = torch.linalg.qr(random(self.size, self.size, seed=seed)).Q.float()
            self.q = basis.double()
        self.mask.set_prior(random(self.size, seed=seed), pinned=pinned, basis=basis)
        self.p, self.calibrated = self.mask.prior.tolist(), True

    @precondition(lambda self: self.hard is not None)
    @rule()
    def calibrate_too_late(self) -> None:
        with pytest.raises(AssertionError, match="never changes again"):
            self.mask.set_prior(torch.ones(self.size))

    @rule(way=st.sampled_from(["state_dict", "safetensors", "pickle", "deepcopy"]))
    def go_on_with_a_copy(self, way: str) -> None:
        before = self.mask
        if way == "pickle":
            self.mask = pickle.loads(pickle.dumps(before))
        elif way == "deepcopy":
            self.mask = copy.deepcopy(before)
        else:
            state = before.state_dict()
            if way == "safetensors":
                state = safetensors.torch.load(safetensors.torch.save(dict(state)))
            self.mask = UnifiedMask(self.size, self.kept, **self.options)
            self.mask.load_state_dict(state)
        with torch.no_grad():
            for tensor in (*before.parameters(), *before.buffers()):
                tensor.zero_()  # whatever happens to the original is nothing to the copy

    @rule()
    def cast_to_double_and_back(self) -> None:
        self.mask.double().float()

    @rule()
    def cast_to_half_and_restore(self) -> None:
        if self.calibrated:
            with pytest.raises(PatError, match=r"prior.* in torch\.bfloat16; expected float32"):
                copy.deepcopy(self.mask).bfloat16().restore_float32()
            return
        weights = [parameter.detach().clone() for parameter in self.mask.parameters()]
        self.mask.bfloat16().restore_float32()
        for parameter, weight in zip(self.mask.parameters(), weights, strict=True):
            parameter.data = weight
        assert {buffer.dtype for buffer in self.mask.buffers()} <= {torch.float32, torch.bool, torch.int64}

    def best(self) -> list[int]:
        """The kept entries by the specification."""
        if self.kind == "frozen" and not any(self.p):
            return list(range(self.size - self.kept, self.size))
        # Sums of float32 numbers, as the mask takes them.
        score = (torch.tensor(self.w) + torch.tensor(self.p)).tolist()
        order = sorted(range(self.size), key=lambda i: (i not in self.pinned, -score[i], i))
        # Pinned entries are all as good as each other.
        return sorted(order[: self.kept])

    def expected(self) -> list[float]:
        if self.hard is not None:
            return [float(i in self.hard) for i in range(self.size)]
        step, s0 = self.step or 0, self.s0 if self.step is not None else 1
        if self.kind == "frozen":
            stay = self.best()
            return [1.0 if i in stay else 1 - step / s0 for i in range(self.size)]
        pairs = zip(self.w, self.p, strict=True)
        return [1.0 if i in self.pinned else expected_value(w, p, step, s0) for i, (w, p) in enumerate(pairs)]

    @invariant()
    def state_is_what_it_was_moved_to(self) -> None:
        mask = self.mask
        assert mask.hardened == (self.hard is not None) and mask.calibrated == self.calibrated
        assert (mask.milestone_step, mask.step) == ((None, 0) if self.step is None else (self.s0, self.step))
        assert mask.keep_indices.tolist() == (list(range(self.size)) if self.hard is None else self.hard)
        assert self.hard is None or len(self.hard) == self.kept
        active = [i for i in range(self.size) if i in self.pinned or self.w[i] + self.p[i] > 0]
        counts = self.hard is None and self.kind == "trainable"
        assert mask.num_active == (len(active) if counts else self.kept)

    @invariant()
    def function_is_the_specification_s(self) -> None:
        expected = self.expected()
        tau = 1 / (1 - math.log(max(self.step or 1, 1)) / math.log(self.s0)) if 1 < self.s0 > (self.step or 0) else 1
        tolerance = FLOAT32_SIGMOID * max(1, tau) * (1 + max(map(abs, [*self.w, *self.p])))
        values = self.mask.values()
        assert values.tolist() == pytest.approx(expected, abs=tolerance, rel=0)
        assert values.requires_grad == (self.kind == "trainable")
        if self.hard is None and self.kind == "trainable":
            assert all(0 < value < 1.5 + 1e-6 for value in values.tolist())
        y = random(3, self.size, seed=7).float()
        output = torch.einsum("ij,j,kj,tk->ti", self.q, torch.tensor(expected).double(), self.q, y.double())
        torch.testing.assert_close(self.mask(y).double(), output, atol=10 * tolerance + 1e-5, rtol=0)


MaskLife.TestCase.settings = settings(max_examples=40, stateful_step_count=12)
TestMaskLife = MaskLife.TestCase
