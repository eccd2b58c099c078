"""The unified mask acts in its basis, and casts that basis once for all writers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

from pat.errors import PatError
from pat.method.basis import UnifiedMask

HIDDEN, KEPT = 12, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def orthogonal(seed: int = 5) -> Tensor:
    return torch.linalg.qr(random(HIDDEN, HIDDEN, seed=seed)).Q


def trained_mask(step: int, *, has_basis: bool = True, kind: str = "trainable", double: bool = False) -> UnifiedMask:
    mask = UnifiedMask(HIDDEN, KEPT, kind=kind, has_basis=has_basis)
    if double:
        mask.double()
    if mask.weight is not None:
        with torch.no_grad():
            mask.weight.copy_(random(HIDDEN))
    pinned = torch.zeros(HIDDEN, dtype=torch.bool)
    pinned[1] = True
    mask.set_prior(random(HIDDEN, seed=3), pinned=pinned, basis=orthogonal() if has_basis else None)
    mask.set_step(step, 20)
    return mask


@pytest.mark.parametrize("step", [0, 1, 7, 19, 20])
def test_forward_is_the_gate_in_its_basis(step: int) -> None:
    mask, q = trained_mask(step, double=True), orthogonal()
    y = random(2, 3, HIDDEN, seed=3)
    expected = torch.einsum("ij,j,kj,btk->bti", q, mask.values().detach(), q, y)
    torch.testing.assert_close(mask(y).detach(), expected, atol=1e-12, rtol=0)


def test_at_step_zero_of_fresh_weights_the_mask_is_the_identity_bit_for_bit() -> None:
    mask = UnifiedMask(HIDDEN, KEPT, has_basis=True, has_head_factor=True)
    assert torch.equal(mask.basis, torch.eye(HIDDEN)) and torch.equal(mask.head_factor, torch.ones(HIDDEN))
    assert (mask.hidden_size, mask.pruned_hidden_size, mask.lr_multiplier) == (HIDDEN, KEPT, 1)
    factor = random(HIDDEN, seed=6)
    mask.set_prior(10 * random(HIDDEN), basis=orthogonal(), head_factor=factor)
    mask.set_step(0, 20)
    y = torch.randn(3, HIDDEN)
    assert torch.equal(mask(y), y)
    assert torch.equal(mask.head_factor, factor.float())


@pytest.mark.parametrize("step", [1, 19])
def test_gradients_by_finite_differences(step: int) -> None:
    mask = trained_mask(step, double=True)
    y = random(2, HIDDEN, seed=3).requires_grad_()
    weight = (0.1 * random(HIDDEN, seed=4)).requires_grad_()

    def function(w: Tensor, v: Tensor) -> Tensor:
        return torch.func.functional_call(mask, {"weight": w}, (v,))

    assert torch.autograd.gradcheck(function, (weight, y))


def test_a_hard_mask_keeps_the_proxy_weights_in_the_graph_with_zero_gradient() -> None:
    mask, y = trained_mask(20), torch.randn(2, HIDDEN, requires_grad=True)
    mask(y).sum().backward()
    assert mask.weight.grad is not None and not mask.weight.grad.any()
    assert y.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_that_rounded_a_calibration_is_an_error(dtype: torch.dtype) -> None:
    mask = trained_mask(0).to(dtype)
    with pytest.raises(PatError, match=r"prior, basis in torch\.\w*float16; expected float32.*calibrate\(\) again"):
        mask.restore_float32()
    prior, basis = random(HIDDEN, seed=3), orthogonal()
    mask.set_prior(prior, basis=basis)
    mask.restore_float32()
    assert torch.equal(mask.prior, prior.float()) and torch.equal(mask.basis, basis.float())


# -- what a large model asks of it: several devices, memory, compilation -----------------------------------------------


class OneDevice(TorchFunctionMode):
    """Refuse operations over several devices, as accelerators do; meta matrix products alone would not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.dim()}
        assert len(devices) <= 1 or func in (torch.where, Tensor.to), f"{func} over {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("has_basis", "step", "kind"),
    [(True, 1, "trainable"), (True, 20, "trainable"), (False, 1, "frozen"), (False, 20, "trainable")],
)
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
    mask = trained_mask(step)
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
    mask, y = trained_mask(3), torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    before = mask(y)
    change(mask)
    assert not torch.equal(mask(y), before)
    for step in (3, 20):
        mask.set_step(step, 20)
        other = UnifiedMask(HIDDEN, KEPT, has_basis=True)
        other.load_state_dict(mask.state_dict())
        assert torch.equal(mask(y), other(y))


def test_the_shared_cast_is_neither_saved_nor_copied() -> None:
    mask, y = trained_mask(3), torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    names, size = set(mask.state_dict()), len(pickle.dumps(mask))
    expected = mask(y)
    assert set(mask.state_dict()) == names and len(pickle.dumps(mask)) == size
    other = copy.deepcopy(mask)
    with torch.no_grad():
        new_basis(other)
    assert not torch.equal(other(y), expected) and torch.equal(mask(y), expected)


@pytest.mark.parametrize(("kind", "has_basis"), [("trainable", True), ("frozen", False)])
def test_a_compiled_mask_is_not_compiled_anew_for_every_step(kind: str, has_basis: bool) -> None:
    mask, y = trained_mask(1, has_basis=has_basis, kind=kind), torch.randn(2, HIDDEN, dtype=torch.bfloat16)
    counter = CompileCounter()
    compiled = torch.compile(mask, backend=counter, fullgraph=True)
    for step in (1, 2, 3, 12):
        mask.set_step(step, 20)
        assert torch.equal(compiled(y), mask(y))
    assert counter.frame_count == 1
