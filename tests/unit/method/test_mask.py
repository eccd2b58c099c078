"""The unified mask: equation 6 with and without a prior, exact selection, and that a hard mask never changes."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

from pat.errors import PatError
from pat.method.basis import UnifiedMask

HIDDEN, KEPT = 12, 8

FLOAT32_SIGMOID = 4e-7
"""Three float32 roundings of numbers up to 1.5 (product, sigmoid, sum); tau is rounded to float32 as well."""
FLOAT64 = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def make(weight: Tensor | None = None, *, double: bool = False, **options) -> UnifiedMask:
    """A mask whose proxy weights w_M are `weight`."""
    mask = UnifiedMask(HIDDEN, KEPT, **options)
    if double:
        mask.double()
    if weight is not None:
        with torch.no_grad():
            mask.weight.copy_(weight / mask.lr_multiplier)
    return mask


def orthogonal(seed: int = 5) -> Tensor:
    return torch.linalg.qr(random(HIDDEN, HIDDEN, seed=seed)).Q


def expected_gate(w: float, p: float, step: int, s0: int) -> float:
    """Equations 6 to 8 and the prior's term, from the specification, in 50 digits."""
    with mpmath.workdps(50):
        tau = 1 / (1 - mpmath.log(step) / mpmath.log(s0)) if step >= 1 else mpmath.mpf(1)
        beta = mpmath.mpf(1) / 2 - mpmath.mpf(step) / s0 if 2 * step < s0 else mpmath.mpf(0)
        return float(1 / (1 + mpmath.exp(-tau * (w + (1 - 2 * beta) * p))) + beta)


# -- soft values (equation 6) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("s0", [1, 2, 4, 7, 40, 200])
@pytest.mark.parametrize("double", [False, True])
def test_soft_gate_is_equation_6(s0: int, with_prior: bool, double: bool) -> None:
    w = random(HIDDEN, seed=1)
    p = 0.5 * random(HIDDEN, seed=2) if with_prior else torch.zeros(HIDDEN, dtype=torch.float64)
    for step in sorted({0, 1, s0 // 4, s0 // 2, s0 - 1}):
        if step >= s0:
            continue
        mask = make(w, double=double)
        if with_prior:
            mask.set_prior(p)
        mask.set_step(step, s0)
        if double:
            expected = [expected_gate(a, b, step, s0) for a, b in zip(w.tolist(), p.tolist(), strict=True)]
        else:  # from the float32 values the mask holds
            pairs = zip(mask.weight.tolist(), mask.prior.tolist(), strict=True)
            expected = [expected_gate(a, b, step, s0) for a, b in pairs]
        tau = 1 / (1 - math.log(max(step, 1)) / math.log(s0)) if s0 > 1 else 1.0
        # The exponent's rounding is multiplied by tau, which reaches 200 one step before a milestone of 200.
        tolerance = FLOAT64 * max(1, tau) if double else FLOAT32_SIGMOID * max(1, tau)
        got = mask.values().detach().double().tolist()
        assert got == pytest.approx(expected, abs=tolerance, rel=0), f"step {step}"


@pytest.mark.parametrize("s0", [1, 2, 40])
@pytest.mark.parametrize("has_basis", [False, True])
def test_at_step_zero_the_gate_is_exactly_one_and_the_mask_the_identity(s0: int, has_basis: bool) -> None:
    mask = make(has_basis=has_basis)
    mask.set_prior(10 * random(HIDDEN), basis=orthogonal() if has_basis else None)
    mask.set_step(0, s0)
    y = torch.randn(3, HIDDEN)
    assert torch.equal(mask.values().detach(), torch.ones(HIDDEN))
    assert torch.equal(mask(y), y)
    with torch.no_grad():
        assert torch.equal(mask(y), y)


def test_training_and_evaluation_agree_at_step_zero_even_without_a_callback() -> None:
    """Who trains the mask but never moves it must not see another function as soon as gradients are off."""
    mask, y = make(random(HIDDEN)), torch.randn(3, HIDDEN)
    with torch.no_grad():
        evaluated = mask(y)
    assert torch.equal(mask(y), evaluated)


def test_soft_gate_is_not_clamped() -> None:
    mask = make(torch.full((HIDDEN,), 8.0, dtype=torch.float64))
    mask.set_step(1, 100)
    assert (mask.values() > 1.48).all()


def test_without_a_prior_the_offset_does_not_change_the_argument_of_the_sigmoid() -> None:
    mask = make(torch.zeros(HIDDEN, dtype=torch.float64))
    for step in (1, 5, 9, 19):
        mask.set_step(step, 20)
        assert mask.values().detach().tolist() == pytest.approx([0.5 + max(0, 0.5 - step / 20)] * HIDDEN)


def test_pinned_channels_are_one_throughout_and_count_in_selection_not_in_the_active_loss() -> None:
    w = -torch.arange(1, HIDDEN + 1, dtype=torch.float64)
    mask = make(w)
    pinned = torch.zeros(HIDDEN, dtype=torch.bool)
    pinned[[9, 11]] = True
    mask.set_prior(torch.full((HIDDEN,), 0.01), pinned=pinned)
    for step in (0, 1, 5, 10, 19):
        mask.set_step(step, 20)
        assert torch.equal(mask.values()[pinned], torch.ones(2))
        assert (mask.values()[~pinned] < 1).all()
    assert mask.active_loss().item() == KEPT - 2  # no free channel is active, the two pinned ones are
    mask.set_step(20, 20)
    assert mask.keep_indices.tolist() == [0, 1, 2, 3, 4, 5, 9, 11]


# -- the basis -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 7, 19, 20])
@pytest.mark.parametrize("has_basis", [False, True])
def test_forward_is_the_gate_in_its_basis(step: int, has_basis: bool) -> None:
    q = orthogonal() if has_basis else torch.eye(HIDDEN, dtype=torch.float64)
    mask = make(random(HIDDEN), double=True, has_basis=has_basis)
    mask.set_prior(random(HIDDEN, seed=2), basis=q if has_basis else None)
    mask.set_step(step, 20)
    y = random(2, 3, HIDDEN, seed=3)
    gate = mask.values().detach()
    expected = torch.einsum("ij,j,kj,btk->bti", q, gate, q, y)
    torch.testing.assert_close(mask(y).detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_basis", [False, True])
@pytest.mark.parametrize("step", [1, 20])
def test_output_keeps_the_dtype_and_the_state_stays_float32(dtype: torch.dtype, has_basis: bool, step: int) -> None:
    mask = make(random(HIDDEN), has_basis=has_basis)
    mask.set_step(step, 20)
    assert mask(torch.randn(2, HIDDEN).to(dtype)).dtype == dtype
    assert mask.weight.dtype == torch.float32 and mask.prior.dtype == torch.float32


# -- gradients (acceptance: finite differences in float64) -----------------------------------------------------------


def with_weight(mask: UnifiedMask, weight: Tensor, y: Tensor) -> Tensor:
    return torch.func.functional_call(mask, {"weight": weight}, (y,))


@pytest.mark.parametrize("step", [1, 10, 25, 39])
@pytest.mark.parametrize("has_basis", [False, True])
@pytest.mark.parametrize("lr_multiplier", [1.0, 40.0])
def test_gradients_of_mask_and_input_by_finite_differences(step: int, has_basis: bool, lr_multiplier: float) -> None:
    mask = make(double=True, has_basis=has_basis, lr_multiplier=lr_multiplier)
    pinned = torch.zeros(HIDDEN, dtype=torch.bool)
    pinned[3] = True
    mask.set_prior(0.1 * random(HIDDEN, seed=2), pinned=pinned, basis=orthogonal() if has_basis else None)
    mask.set_step(step, 40)
    weight = (0.1 * random(HIDDEN, seed=4) / lr_multiplier).requires_grad_()
    y = random(2, HIDDEN, seed=3).requires_grad_()
    # Steps small against the width of the sigmoid, which is 1 / (tau * lr_multiplier) in raw weights.
    eps = 1e-6 / lr_multiplier
    assert torch.autograd.gradcheck(lambda w: with_weight(mask, w, y.detach()), weight, eps=eps)
    assert torch.autograd.gradcheck(lambda v: with_weight(mask, weight.detach(), v), y)


def test_the_mask_has_a_gradient_at_step_zero() -> None:
    """There the gate is exactly 1, but training has to start: central differences under gradient mode."""
    mask = make(double=True)
    mask.set_step(0, 40)
    y = random(2, HIDDEN)
    weight = torch.zeros(HIDDEN, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(with_weight(mask, weight, y).sum(), weight)
    for index in range(HIDDEN):
        shift = torch.zeros(HIDDEN, dtype=torch.float64)
        shift[index] = 1e-6
        numeric = (with_weight(mask, shift, y).sum() - with_weight(mask, -shift, y).sum()) / 2e-6
        assert gradient[index].item() == pytest.approx(numeric.item(), rel=1e-6)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("has_basis", [False, True])
def test_a_hard_mask_keeps_the_proxy_weights_in_the_graph_with_zero_gradient(has_basis: bool) -> None:
    mask = make(random(HIDDEN), has_basis=has_basis)
    mask.set_step(20, 20)
    y = torch.randn(2, HIDDEN, requires_grad=True)
    mask(y).sum().backward()
    assert mask.weight.grad is not None and not mask.weight.grad.any()
    assert y.grad.abs().max() > 0
    assert mask.active_loss().item() == 0


def test_active_loss_counts_proxy_weights_plus_prior() -> None:
    w = torch.tensor([1.0, 1.0, -1.0, -1.0] * 3, dtype=torch.float64)
    mask = make(w)
    assert mask.active_loss().item() == pytest.approx(KEPT - 6)
    prior = torch.zeros(HIDDEN)
    prior[[2, 3, 6, 7]] = 1.5  # lifts four inactive channels over zero
    mask.set_prior(prior)
    assert mask.active_loss().item() == pytest.approx(10 - KEPT)
    mask.active_loss().backward()
    assert torch.equal(mask.weight.grad, torch.ones(HIDDEN))


# -- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_at_the_milestone_exactly_the_best_channels_stay(seed: int) -> None:
    w, p = random(HIDDEN, seed=seed), random(HIDDEN, seed=seed + 10)
    mask = make(w)
    mask.set_prior(p)
    mask.set_step(20, 20)
    score = (w + p).tolist()
    best = sorted(sorted(range(HIDDEN), key=lambda i: -score[i])[:KEPT])
    assert mask.keep_indices.tolist() == best
    expected = torch.zeros(HIDDEN).index_fill(0, torch.tensor(best), 1.0)
    assert torch.equal(mask.values().detach(), expected)


@pytest.mark.parametrize("value", [-3.0, 0.0, 2.0])
def test_exactly_the_target_stays_wherever_the_proxy_weights_are(value: float) -> None:
    """All above zero, all below, all equal: the width is met, ties are broken by index."""
    mask = make(torch.full((HIDDEN,), value, dtype=torch.float64))
    mask.set_step(5, 5)
    assert mask.keep_indices.tolist() == list(range(KEPT))


def test_ties_at_the_cut_are_broken_by_index() -> None:
    w = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.float64)
    mask = make(w)
    mask.set_step(5, 5)
    assert mask.keep_indices.tolist() == [0, 1, 2, 3, 5, 7, 9, 11]


def test_pinned_channels_are_kept_however_low_they_score() -> None:
    w = torch.arange(HIDDEN, dtype=torch.float64)
    mask = make(w)
    pinned = torch.zeros(HIDDEN, dtype=torch.bool)
    pinned[[0, 2]] = True
    mask.set_prior(torch.zeros(HIDDEN), pinned=pinned)
    mask.set_step(5, 5)
    assert mask.keep_indices.tolist() == [0, 2, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("kind", ["trainable", "frozen"])
@pytest.mark.parametrize("has_basis", [False, True])
def test_a_hard_mask_never_changes_again(kind: str, has_basis: bool) -> None:
    mask = make(random(HIDDEN) if kind == "trainable" else None, kind=kind, has_basis=has_basis)
    mask.set_prior(random(HIDDEN, seed=3), basis=orthogonal() if has_basis else None)
    mask.set_step(9, 10)
    assert not mask.hardened and len(mask.keep_indices) == HIDDEN
    mask.set_step(10, 10)
    keep, y = mask.keep.clone(), torch.randn(4, HIDDEN)
    output = mask(y).detach()
    assert mask.hardened and int(keep.sum()) == KEPT

    optimizer = torch.optim.AdamW(mask.parameters(), lr=1.0, weight_decay=0.5) if kind == "trainable" else None
    for step, s0 in ((11, 10), (0, 10), (5, 10), (3, 1000), (0, 0), (1000, 10)):
        if optimizer is not None:
            (mask(y).square().sum() + mask.active_loss()).backward()
            with torch.no_grad():
                mask.weight.add_(random(HIDDEN, seed=step))  # whatever moves it
            optimizer.step()
        mask.set_step(step, s0)
        assert torch.equal(mask.keep, keep)
        assert torch.equal(mask(y).detach(), output)
        assert (mask.step, mask.milestone_step) == (10, 10)  # the record of when it was decided


# -- milestone at step 0 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trainable", "frozen"])
def test_milestone_zero_without_a_prior_is_an_error(kind: str) -> None:
    mask = make(kind=kind)
    with pytest.raises(PatError, match="milestone at step 0"):
        mask.set_step(0, 0)
    assert not mask.hardened


@pytest.mark.parametrize("kind", ["trainable", "frozen"])
def test_milestone_zero_with_a_prior_is_hard_from_the_start(kind: str) -> None:
    mask = make(kind=kind)
    mask.set_prior(torch.arange(HIDDEN).flip(0) - 5.5)
    mask.set_step(0, 0)
    assert mask.hardened and mask.keep_indices.tolist() == list(range(KEPT))
    y = torch.randn(2, HIDDEN)
    with torch.no_grad():
        assert not mask(y)[:, KEPT:].any()


# -- the frozen mask of the paper's ablation -------------------------------------------------------------------------


def test_frozen_mask_attenuates_the_first_channels_linearly() -> None:
    mask = make(kind="frozen")
    for step in (0, 1, 5, 10, 19):
        mask.set_step(step, 20)
        expected = [1 - step / 20] * (HIDDEN - KEPT) + [1.0] * KEPT
        assert mask.values().tolist() == pytest.approx(expected, abs=1e-7)
    mask.set_step(20, 20)
    assert mask.values().tolist() == [0.0] * (HIDDEN - KEPT) + [1.0] * KEPT
    assert mask.active_loss().item() == 0
    assert not list(mask.parameters())


def test_frozen_mask_attenuates_the_trailing_channels_of_a_rotation() -> None:
    mask = make(kind="frozen", has_basis=True)
    mask.set_prior(torch.arange(HIDDEN).flip(0) - 3.5, basis=orthogonal())
    mask.set_step(5, 20)
    assert mask.values().tolist() == pytest.approx([1.0] * KEPT + [0.75] * (HIDDEN - KEPT))


# -- state -----------------------------------------------------------------------------------------------------------


def trained_mask(step: int, *, has_basis: bool, kind: str = "trainable") -> UnifiedMask:
    mask = make(random(HIDDEN) if kind == "trainable" else None, has_basis=has_basis, kind=kind)
    pinned = torch.zeros(HIDDEN, dtype=torch.bool)
    pinned[1] = True
    mask.set_prior(random(HIDDEN, seed=3), pinned=pinned, basis=orthogonal() if has_basis else None)
    mask.set_step(step, 20)
    return mask


def through_state_dict(mask: UnifiedMask) -> UnifiedMask:
    kind = "frozen" if mask.weight is None else "trainable"
    other = UnifiedMask(HIDDEN, KEPT, kind=kind, has_basis=mask.basis is not None)
    other.load_state_dict(mask.state_dict())
    return other


def through_pickle(mask: UnifiedMask) -> UnifiedMask:
    return pickle.loads(pickle.dumps(mask))


@pytest.mark.parametrize("copied", [through_state_dict, through_pickle, copy.deepcopy])
@pytest.mark.parametrize("step", [0, 7, 19, 20, 31])
@pytest.mark.parametrize("has_basis", [False, True])
@pytest.mark.parametrize("kind", ["trainable", "frozen"])
def test_a_copy_is_the_same_function_and_goes_on_alike(
    copied: Callable[[UnifiedMask], UnifiedMask], step: int, has_basis: bool, kind: str
) -> None:
    mask = trained_mask(step, has_basis=has_basis, kind=kind)
    other, y = copied(mask), torch.randn(3, HIDDEN)
    for name in ("step", "milestone_step", "hardened", "calibrated"):
        assert getattr(other, name) == getattr(mask, name), name
    assert torch.equal(other(y), mask(y))
    for each in (mask, other):
        each.set_step(20, 20)
    assert torch.equal(other.keep, mask.keep)
    assert torch.equal(other(y), mask(y))


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_mask_that_was_never_moved_stays_the_identity_when_it_is_loaded(calibrated: bool) -> None:
    mask = make()
    if calibrated:
        mask.set_prior(random(HIDDEN))
    other = through_state_dict(mask)
    assert other.milestone_step is None and not other.hardened and other.calibrated == calibrated
    assert torch.equal(other.values().detach(), torch.ones(HIDDEN))


def test_a_mask_is_a_module_whose_only_parameter_is_the_proxy_weights() -> None:
    mask = UnifiedMask(HIDDEN, KEPT, has_basis=True, has_head_factor=True)
    assert [name for name, _ in mask.named_parameters()] == ["weight"]
    assert not mask.weight.any() and isinstance(mask, nn.Module)
    assert {"keep", "prior", "pinned", "basis", "head_factor", "progress"} <= set(mask.state_dict())


# -- what a large model asks of it: several devices, memory, compilation -----------------------------------------------


class OneDevice(TorchFunctionMode):
    """Refuse operations over several devices, as accelerators do; meta matrix products alone would not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.dim()}
        assert len(devices) <= 1 or func in (torch.where, Tensor.to), f"{func} over {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_basis", [False, True])
@pytest.mark.parametrize("step", [1, 20])
@pytest.mark.parametrize("kind", ["trainable", "frozen"])
def test_writers_on_other_devices_get_their_own_copy(has_basis: bool, step: int, kind: str) -> None:
    mask = trained_mask(step, has_basis=has_basis, kind=kind)
    y = torch.randn(2, HIDDEN, device="meta", dtype=torch.bfloat16)
    with OneDevice():
        output = mask(y)
    assert (output.device, output.dtype, output.shape) == (y.device, y.dtype, y.shape)
    assert {buffer.device.type for buffer in mask.buffers()} == {"cpu"}


@pytest.mark.parametrize("step", [1, 20])
def test_all_writers_share_one_cast_of_the_basis(step: int) -> None:
    """Autograd keeps what it needs for the backward pass: a cast per writer would be a matrix per writer."""
    mask = trained_mask(step, has_basis=True)
    num_columns = HIDDEN if step < 20 else HIDDEN - KEPT
    saved = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] in ((HIDDEN, num_columns), (num_columns, HIDDEN)):
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    y = torch.randn(2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.inference_mode():
        mask(y)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(4):
            y = mask(y)
        y.sum().backward()
    assert len(saved) == 1


def new_basis(mask: UnifiedMask) -> None:
    mask.set_prior(mask.prior, basis=orthogonal(seed=8))


def loaded(mask: UnifiedMask) -> None:
    mask.load_state_dict(mask.state_dict() | {"basis": orthogonal(seed=8).float()})


def replaced(mask: UnifiedMask) -> None:
    mask._apply(lambda tensor: orthogonal(seed=8).float() if tensor.shape == (HIDDEN, HIDDEN) else tensor)


@pytest.mark.parametrize("change", [new_basis, loaded, replaced])
def test_the_shared_cast_follows_the_basis(change: Callable[[UnifiedMask], None]) -> None:
    mask, y = trained_mask(3, has_basis=True), torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    before = mask(y)
    change(mask)
    assert not torch.equal(mask(y), before)
    assert torch.equal(mask(y), through_state_dict(mask)(y))
    mask.set_step(20, 20)
    assert torch.equal(mask(y), through_state_dict(mask)(y))


def test_the_shared_cast_is_neither_saved_nor_copied() -> None:
    mask, y = trained_mask(3, has_basis=True), torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    names, size = set(mask.state_dict()), len(pickle.dumps(mask))
    expected = mask(y)
    assert set(mask.state_dict()) == names and len(pickle.dumps(mask)) == size
    other = copy.deepcopy(mask)
    assert torch.equal(other(y), expected)
    with torch.no_grad():
        new_basis(other)
    assert not torch.equal(other(y), expected) and torch.equal(mask(y), expected)


@pytest.mark.parametrize("kind", ["trainable", "frozen"])
@pytest.mark.parametrize("has_basis", [False, True])
def test_a_compiled_mask_is_not_compiled_anew_for_every_step(kind: str, has_basis: bool) -> None:
    mask, y = trained_mask(1, has_basis=has_basis, kind=kind), torch.randn(2, HIDDEN, dtype=torch.bfloat16)
    counter = CompileCounter()
    compiled = torch.compile(mask, backend=counter, fullgraph=True)
    for step in (1, 2, 3, 12):
        mask.set_step(step, 20)
        assert torch.equal(compiled(y), mask(y))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_that_rounded_a_calibration_is_an_error(dtype: torch.dtype) -> None:
    mask = trained_mask(0, has_basis=True).to(dtype)
    with pytest.raises(PatError, match=r"prior, basis in torch\.\w*float16; expected float32.*calibrate\(\) again"):
        mask.restore_float32()
    prior, basis = random(HIDDEN, seed=3), orthogonal()
    mask.set_prior(prior, basis=basis)
    mask.restore_float32()
    assert torch.equal(mask.prior, prior.float()) and torch.equal(mask.basis, basis.float())


@pytest.mark.parametrize("step", [0, 3])
def test_a_cast_before_the_calibration_is_undone(step: int) -> None:
    mask = make(has_basis=True, has_head_factor=True)
    mask.set_step(step, 20)
    expected = {name: buffer.clone() for name, buffer in mask.named_buffers()}
    mask.bfloat16()
    mask.restore_float32()
    for name, buffer in mask.named_buffers():
        assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name]), name
