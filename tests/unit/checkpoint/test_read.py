"""Reading safetensors files tensor by tensor, and what each parameter is stored as."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import KINDS, build
from torch import Tensor

from pat.checkpoint import checkpoint as reading
from pat.checkpoint.layout import UnknownLayoutError, stored_layout
from pat.checkpoint.read import Checkpoint, open_checkpoint
from pat.errors import PatError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(7, 5, generator=generator).half(),
        "brain": torch.randn(4, 6, generator=generator).bfloat16(),
        "single": torch.randn(3, generator=generator),
        "whole": torch.arange(4),
    }


@pytest.fixture
def stored(tmp_path: Path) -> Checkpoint:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_checkpoint(str(tmp_path))
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [3, 2**20])
def test_tensors_are_read_in_the_dtype_asked_for(
    stored: Checkpoint, dtype: torch.dtype, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WINDOW_ELEMENTS", window)
    for name in ("half", "brain", "single"):
        expected = tensors()[name]
        out = torch.empty(expected.shape, dtype=dtype)
        stored.read(name, out)
        assert torch.equal(out, expected.to(dtype))


def test_a_part_of_a_tensor(stored: Checkpoint) -> None:
    out = torch.empty(10)
    stored.read("half", out, first=15)
    assert torch.equal(out, tensors()["half"].flatten()[15:25].float())


def test_a_mapped_tensor_is_what_lies_in_the_file_and_never_changes_it(stored: Checkpoint) -> None:
    for name in ("half", "brain", "single"):
        flat = tensors()[name].flatten()
        assert torch.equal(stored.mapped(name), flat)
        assert torch.equal(stored.mapped(name, 1, 2), flat[1:3])
    mapped = stored.mapped("single")
    stored.close()
    assert torch.equal(mapped, tensors()["single"])
    mapped.zero_()
    assert torch.equal(stored.mapped("single"), tensors()["single"])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked")
def test_all_of_a_tensor_is_asked_for_in_pieces_the_system_accepts(
    stored: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(reading.os, "posix_fadvise", lambda _, start, length, __: asked.append((start, length)))
    monkeypatch.setattr(reading, "_ASKED_BYTES", 16)
    stored.prefetch("half")
    stored._asking.shutdown()
    place = stored.tensors["half"]
    assert [length for _, length in asked] == [16, 16, 16, 16, 6]
    assert [start for start, _ in asked] == list(range(place.offset, place.offset + 70, 16))


def test_what_is_no_weight_is_known_as_such(stored: Checkpoint) -> None:
    assert stored.tensors["whole"].dtype is None
    assert stored.tensors["brain"].shape == (4, 6)


def test_sizes_of_shards(tmp_path: Path) -> None:
    model = build("llama", tied=False)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    one, many = open_checkpoint(str(tmp_path / "one")), open_checkpoint(str(tmp_path / "many"))
    assert one is not None
    assert many is not None
    assert len(many.files) > 2
    assert one.tensors.keys() == many.tensors.keys()
    assert one.shard_bytes() is None
    largest = many.shard_bytes()
    assert largest is not None
    assert 30_000 < largest <= 60_000


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert open_checkpoint(str(tmp_path)) is None


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_a_file_cut_short(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PatError, match=r"Could not load the model .*model\.safetensors"):
        open_checkpoint(str(tmp_path))


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    build("llama", tied=False).save_pretrained(tmp_path, max_shard_size="60KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(PatError, match="Could not load the model"):
        open_checkpoint(str(tmp_path))


def test_an_index_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{broken")
    with pytest.raises(PatError, match="Could not load the model"):
        open_checkpoint(str(tmp_path))


def test_a_file_that_shrinks_while_it_is_read(stored: Checkpoint) -> None:
    stored.files[0].write_bytes(stored.files[0].read_bytes()[:-200])
    with pytest.raises(PatError, match="ends too early"):
        for name in ("half", "brain", "single"):
            stored.read(name, torch.empty(stored.tensors[name].shape))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_layouts_are_those_of_saved_models(family: str, tied: bool, tmp_path: Path) -> None:
    model = build(family, tied=tied)
    model.save_pretrained(tmp_path)
    layout, found = stored_layout(model), open_checkpoint(str(tmp_path))
    assert found is not None
    pieces = {piece.name: piece.shape for group in layout.values() for piece in group}
    assert pieces == {name: stored.shape for name, stored in found.tensors.items()}
    for name, parameter in model.named_parameters():
        out = torch.empty(parameter.shape)
        for piece in layout[name]:
            found.read(piece.name, out.view(-1)[piece.start : piece.start + piece.numel])
        assert torch.equal(out, parameter), name


def test_another_order_than_rows_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from pat.checkpoint import layout

    model = build("llama", tied=False)
    monkeypatch.setattr(layout, "revert_weight_conversion", lambda _, s: {n: t.flip(0) for n, t in s.items()})
    with pytest.raises(UnknownLayoutError, match="another order"):
        stored_layout(model)


def test_headers_with_sizes_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["single"]["shape"] = [4]
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(PatError, match="single has 12 bytes"):
        open_checkpoint(str(tmp_path))
