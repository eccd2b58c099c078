"""The tensors of a checkpoint as its headers describe them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build

from pat.errors import PatError
from pat.loading.stored import dtype_of, stored_tensors

TENSORS = {
    "norm.weight": torch.ones(100),
    "proj.weight": torch.ones(4, 60, dtype=torch.bfloat16),
    "proj.weight.absmax": torch.ones(1000),
    "packed": torch.ones(4000, dtype=torch.uint8),
}


def saved(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_shapes_dtypes_and_the_dtype_of_most_weights(tmp_path: Path) -> None:
    """Neither what belongs to a quantised weight nor the packed weight itself says what the model is stored in."""
    saved(tmp_path)
    found = stored_tensors(str(tmp_path))
    assert found is not None
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "norm.weight": (torch.float32, (100,)),
        "proj.weight": (torch.bfloat16, (4, 60)),
        "proj.weight.absmax": (torch.float32, (1000,)),
        "packed": (None, (4000,)),
    }
    assert dtype_of(found) == torch.bfloat16


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    model = build("llama", tied=False)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    found = stored_tensors(str(tmp_path))
    assert found is not None
    assert {name: tensor.shape for name, tensor in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert len({tensor.file for tensor in found.values()}) > 2
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(PatError, match="Could not load the model"):
        stored_tensors(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", None])
def test_no_safetensors(name: str | None, tmp_path: Path) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(b"")
    assert stored_tensors(str(tmp_path)) is None
    assert stored_tensors("nobody/nothing") is None


def break_header(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["norm.weight"]["shape"] = [101]
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        break_header,
    ],
    ids=["empty", "header cut short", "tensors cut short", "sizes that do not fit"],
)
def test_a_file_that_is_not_whole(spoil: object, tmp_path: Path) -> None:
    spoil(saved(tmp_path))  # type: ignore[operator]
    with pytest.raises(PatError, match=r"Could not load the model .*model\.safetensors is not readable"):
        stored_tensors(str(tmp_path))


def test_an_index_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{broken")
    with pytest.raises(PatError, match="Could not load the model"):
        stored_tensors(str(tmp_path))


def test_an_index_of_files_elsewhere_is_refused_in_its_own_words(tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PatError, match="does not lie in the model's own folder") as error:
        stored_tensors(str(tmp_path))
    assert str(error.value).count("Could not load") == 1
