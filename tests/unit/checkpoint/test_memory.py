"""Memory that is used again: never while a tensor still has it, and always when none has."""

from __future__ import annotations

import gc

import pytest
import torch

from pat.checkpoint import memory
from pat.checkpoint.memory import ReusedMemory

CPU = torch.device("cpu")


@pytest.fixture
def reused(monkeypatch: pytest.MonkeyPatch) -> ReusedMemory:
    monkeypatch.setattr(memory, "SMALLEST_BYTES", 256)
    return ReusedMemory()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 50, 7), (4096,), (2, 3), (0, 5), ()])
def test_tensors_are_like_any_other(reused: ReusedMemory, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for _ in range(2):  # the second one in the memory of the first
        tensor = reused.empty(shape, dtype, CPU)
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % memory.ALIGNMENT == 0 or tensor.nbytes < memory.SMALLEST_BYTES
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        tensor.copy_(values)
        assert torch.equal(tensor, values)
        del tensor


def test_memory_returns_with_the_last_tensor_that_shares_it(reused: ReusedMemory) -> None:
    first = reused.empty((64, 16), torch.float32, CPU)
    place = first.data_ptr()
    view = torch.nn.Parameter(first[3:5].mT, requires_grad=False)
    del first
    gc.collect()
    second = reused.empty((64, 16), torch.float32, CPU)
    assert second.data_ptr() != place
    view.fill_(1)
    second.fill_(2)
    assert (view == 1).all()
    del view
    assert reused.empty((64, 16), torch.bfloat16, CPU).data_ptr() == place


def test_the_smallest_that_fits_is_taken(reused: ReusedMemory) -> None:
    tensors = [reused.empty((size,), torch.uint8, CPU) for size in (4096, 1024, 2048)]
    places = [tensor.data_ptr() for tensor in tensors]
    del tensors
    assert reused.empty((900,), torch.uint8, CPU).data_ptr() == places[1]


def test_what_is_too_small_is_given_back(reused: ReusedMemory) -> None:
    small = reused.empty((1024,), torch.uint8, CPU)
    del small
    assert reused._free
    large = reused.empty((4096,), torch.uint8, CPU)
    assert not reused._free
    del large
    assert [block.nbytes for block in reused._free] == [4096 + memory.ALIGNMENT]
    reused.clear()
    assert not reused._free


def test_small_tensors_and_other_devices_are_left_to_torch(reused: ReusedMemory) -> None:
    for size, device in ((10, CPU), (1000, torch.device("meta"))):
        tensor = reused.empty((size,), torch.float32, device)
        del tensor
        assert not reused._free
