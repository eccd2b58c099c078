"""Weight files written tensor by tensor are those that `save_pretrained` writes."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build
from transformers import AutoModelForCausalLM

from pat.checkpoint import shards
from pat.checkpoint.shards import ShardWriter
from pat.errors import RunFailed
from pat.loading import empty_model


@pytest.mark.parametrize("limit", ["5GB", "60KB", "10KB"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma2", False), ("mixtral", False)])
def test_files_are_those_of_save_pretrained(family: str, tied: bool, limit: str, tmp_path: Path) -> None:
    model = build(family, tied=tied, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "stock", max_shard_size=limit)
    (tmp_path / "streamed").mkdir()
    with ShardWriter(
        tmp_path / "streamed", empty_model(model.config, torch.bfloat16), torch.bfloat16, max_shard_size=limit
    ) as writer:
        for name, parameter in reversed(list(model.named_parameters())):
            writer.write(name, parameter.float())
    weights = [sorted((tmp_path / name).glob("model*")) for name in ("stock", "streamed")]
    stock, streamed = ({path.name: path.read_bytes() for path in paths} for paths in weights)
    if family != "mixtral" or limit == "5GB":  # transformers sorts what it converts before it cuts it into files
        assert stock == streamed
    model.config.save_pretrained(tmp_path / "streamed")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    if limit != "5GB":
        index = json.loads(streamed["model.safetensors.index.json"])
        assert set(index["weight_map"].values()) == streamed.keys() - {"model.safetensors.index.json"}
        assert index["metadata"]["total_size"] == 2 * index["metadata"]["total_parameters"]


def written_short(tmp_path: Path) -> None:
    model = empty_model(build("llama", tied=True).config)
    with ShardWriter(tmp_path, model, torch.float32, max_shard_size="5GB") as writer:
        for name, parameter in list(model.named_parameters())[1:]:
            writer.write(name, torch.zeros(parameter.shape))


def test_a_weight_left_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"1 weights were not written, such as model\.embed_tokens\.weight"):
        written_short(tmp_path)


@pytest.mark.parametrize(("name", "shape"), [("model.norm.bias", (48,)), ("model.norm.weight", (47,))])
def test_a_weight_that_does_not_belong_is_an_error(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = empty_model(build("llama", tied=True).config)
    with (
        pytest.raises(RunFailed, match="do not fit"),
        ShardWriter(tmp_path, model, torch.float32, max_shard_size="5GB") as writer,
    ):
        writer.write(name, torch.zeros(shape))


def test_a_full_disk_shows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "posix_fallocate", full, raising=False)
    model = empty_model(build("llama", tied=True).config)
    with pytest.raises(RunFailed, match="No space left on device"):
        ShardWriter(tmp_path, model, torch.float32, max_shard_size="5GB")


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_reserve_space_is_written_to(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: int) -> None:
        raise OSError(number, "Operation not supported")

    monkeypatch.setattr(shards.os, "posix_fallocate", unknown, raising=False)
    model = build("llama", tied=True)
    with ShardWriter(tmp_path, model, torch.float32, max_shard_size="5GB") as writer:
        for name, parameter in model.named_parameters():
            writer.write(name, parameter)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()


def test_an_error_while_writing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards, "memoryview", fail, raising=False)
    with pytest.raises(RunFailed, match="Input/output error"):
        written_short(tmp_path)


def test_the_header_is_there_before_any_tensor(tmp_path: Path) -> None:
    model = empty_model(build("llama", tied=True).config)
    with pytest.raises(KeyError), ShardWriter(tmp_path, model, torch.float32, max_shard_size="5GB"):
        found = load_file(tmp_path / "model.safetensors")
        assert {name: tensor.shape for name, tensor in found.items()} == {
            name: parameter.shape for name, parameter in model.named_parameters()
        }
        raise KeyError
