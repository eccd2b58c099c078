"""Models whose weights stay on disk: the same model, with nothing in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, build
from tiny_training import logits
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pat.checkpoint.hollow import StoredWeights, hollow_model
from pat.checkpoint.layout import UnknownLayoutError, stored_layout
from pat.errors import PatError
from pat.loading.stored import stored_tensors

CPU = torch.device("cpu")


def stored(folder: Path, dtype: torch.dtype = torch.float32) -> StoredWeights:
    found = stored_tensors(str(folder))
    assert found is not None
    config: Any = AutoConfig.from_pretrained(folder)
    return StoredWeights(hollow_model(config, dtype, CPU), found, "base")


def memory(model: torch.nn.Module) -> int:
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters() if p.dim() > 1}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_a_running_hollow_model_is_the_model(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    build(family, tied=tied, dtype=dtype).save_pretrained(tmp_path)
    real: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    weights = stored(tmp_path, dtype)
    hollow = weights.model
    assert hollow.dtype == dtype
    buffers = dict(real.named_buffers())
    for name, buffer in hollow.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
        assert buffer.dtype == buffers[name].dtype
    with weights.running(dtype):
        assert torch.equal(logits(hollow), logits(real))
    with weights.running(torch.float32):
        fine = logits(hollow)
    if dtype == torch.float32:
        assert torch.equal(fine, logits(real))
    matrices = [parameter for parameter in hollow.parameters() if parameter.dim() > 1]
    assert all(parameter.isnan().all() for parameter in matrices)
    assert memory(hollow) == len(matrices) * dtype.itemsize
    assert not weights.left_over


def test_weights_are_there_only_while_their_module_runs(tmp_path: Path) -> None:
    build("llama", tied=False).save_pretrained(tmp_path)
    weights = stored(tmp_path)
    seen = []
    with weights.running(torch.float32):
        layers = weights.model.model.layers
        layers[1].mlp.register_forward_hook(lambda *_: seen.append(memory(weights.model)))
        layers[1].mlp.act_fn.register_forward_hook(lambda *_: seen.append(layers[1].mlp.up_proj.weight.isnan().all()))
        logits(weights.model)
    assert seen[0]
    assert seen[1] < 1000


def test_a_module_that_fails_gives_its_weights_back(tmp_path: Path) -> None:
    build("llama", tied=False).save_pretrained(tmp_path)
    weights = stored(tmp_path)
    with weights.running(torch.float32), pytest.raises(RuntimeError):
        weights.model.model.layers[0].mlp.up_proj(torch.ones(2, 5))
    assert all(parameter.isnan().all() for parameter in weights.model.parameters() if parameter.dim() > 1)


def test_weights_are_rounded_as_loading_rounds_them(tmp_path: Path) -> None:
    model = build("llama", tied=False)
    model.save_pretrained(tmp_path)
    weights = stored(tmp_path, torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights.read(name), model.get_parameter(name).bfloat16())
    assert torch.equal(weights.read(name, torch.float32), model.get_parameter(name).bfloat16().float())


def rename(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_a_checkpoint_of_the_bare_model(tmp_path: Path) -> None:
    model = build("llama", tied=True)
    model.save_pretrained(tmp_path)
    rename(tmp_path, lambda found: {name.removeprefix("model."): tensor for name, tensor in found.items()})
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored(tmp_path).read(name), model.get_parameter(name))


def test_experts_stored_as_they_are_in_memory(tmp_path: Path) -> None:
    model = build("mixtral", tied=False)
    model.save_pretrained(tmp_path, save_original_format=False)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert name in load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored(tmp_path).read(name), model.get_parameter(name))


def test_a_tied_matrix_under_the_heads_name(tmp_path: Path) -> None:
    model = build("llama", tied=True)
    model.save_pretrained(tmp_path)
    rename(tmp_path, lambda f: {n.replace("model.embed_tokens", "lm_head"): tensor for n, tensor in f.items()})
    assert torch.equal(stored(tmp_path).read("lm_head.weight"), model.get_parameter("model.embed_tokens.weight"))


def test_a_tied_matrix_that_is_there_twice_is_left_to_transformers(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    rename(tmp_path, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"] + 1})
    with pytest.raises(UnknownLayoutError, match="more than once"):
        stored(tmp_path)


def test_a_checkpoint_that_lacks_a_weight_is_left_to_transformers(tmp_path: Path) -> None:
    """What is missing may be there under a name that only transformers knows."""
    build("llama", tied=True).save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rename(tmp_path, lambda found: {n: t for n, t in found.items() if n != name})
    with pytest.raises(UnknownLayoutError, match=f"{name} is not stored under its own name"):
        stored(tmp_path)


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rename(tmp_path, lambda found: found | {name: torch.ones(3, 4)})
    with pytest.raises(PatError, match=f"1 are missing or of another shape, such as {name}"):
        stored(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    weights = stored(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(PatError, match="is not readable"):
        weights.read("model.layers.1.mlp.up_proj.weight")


def test_a_mapped_weight_never_changes_its_file(tmp_path: Path) -> None:
    model = build("llama", tied=True)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights = stored(tmp_path)
    weights.read(name).zero_()
    assert torch.equal(weights.read(name), model.get_parameter(name))


def test_sizes_of_shards(tmp_path: Path) -> None:
    model = build("llama", tied=False)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert stored(tmp_path / "one").shard_bytes is None
    largest = stored(tmp_path / "many").shard_bytes
    assert largest is not None
    assert 30_000 < largest <= 60_000


def test_another_order_than_rows_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from pat.checkpoint import layout

    model = build("llama", tied=False)
    monkeypatch.setattr(layout, "revert_weight_conversion", lambda _, s: {n: t.flip(0) for n, t in s.items()})
    with pytest.raises(UnknownLayoutError, match="another order"):
        stored_layout(model)


def test_what_nothing_is_read_from_is_left_over(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    rename(tmp_path, lambda found: found | {"extra": torch.ones(2)})
    assert stored(tmp_path).left_over == {"extra"}
