"""Adapters of the paper's published code, made here from the description of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import batch, build, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pat.cli import main
from pat.errors import PatError
from pat.formats.published import read_published

RANK, LORA_RANK, LORA_ALPHA = 5, 3, 4
NUM_KEPT = 29  # of 48, with 4 heads: the next width that loads is 32
LORA_ON = ("q_proj", "v_proj", "down_proj")


def published_tensors(base: Any, *, scaled: bool, trained_mask: bool) -> dict[str, Tensor]:
    """Return the tensors of an adapter with non-trivial values everywhere."""
    generator = torch.Generator().manual_seed(7)
    size = base.config.hidden_size

    def draw(*shape: int, spread: float) -> Tensor:
        return spread * torch.randn(*shape, generator=generator)

    tensors = {}
    layers = range(base.config.num_hidden_layers)
    for place in ("model.dimdown0", *(f"model.layers.{i}.dimdown{b}" for i in layers for b in (0, 1))):
        tensors[f"{place}.dimdown_inout.0.weight"] = draw(RANK, size, spread=0.15)
        tensors[f"{place}.dimdown_inout.1.weight"] = draw(size, RANK, spread=0.3)
        if scaled:
            tensors[f"{place}.dimdown_scale.weight"] = 1 + draw(1, size, spread=0.2)
    if trained_mask:
        order = torch.randperm(size, generator=generator)
        mask = torch.full((size,), -0.5)
        mask[order[:NUM_KEPT]] = 0.5
        mask[order[NUM_KEPT]] = 0.0  # which rounds to 0
        tensors["model.dimdown0.dimdown_mask.mask"] = mask.view(1, 1, -1)
    for name, module in base.named_modules():
        if name.endswith(LORA_ON):
            tensors[f"{name}.lora_A.weight"] = draw(LORA_RANK, module.in_features, spread=0.2)
            tensors[f"{name}.lora_B.weight"] = draw(module.out_features, LORA_RANK, spread=0.2)
    return tensors


def write_published(folder: Path, base_folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_folder), "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA, "target_modules": list(LORA_ON), "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.05, "bias": "none", "loftq_config": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def as_published(base: nn.Module, tensors: dict[str, Tensor], num_kept: int | None) -> nn.Module:
    """Make a base compute what the published code does, by hooks and in the code's own order of operations."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if ".lora_A." in name:
                change = tensors[name.replace("lora_A", "lora_B")] @ tensor * (LORA_ALPHA / LORA_RANK)
                base.get_submodule(name.removesuffix(".lora_A.weight")).weight += change
    mask = tensors.get("model.dimdown0.dimdown_mask.mask")
    size = base.config.hidden_size
    gate = (torch.arange(size) < num_kept) if mask is None else torch.sigmoid(1e6 * mask.flatten()).round()

    def act(prefix: str) -> Any:
        down, up = (tensors[f"{prefix}.dimdown_inout.{i}.weight"] for i in (0, 1))
        scale = tensors.get(f"{prefix}.dimdown_scale.weight", torch.ones(1, size))
        return lambda module, args, out: scale * (gate * (out + out @ down.T @ up.T))

    base.get_submodule("model.embed_tokens").register_forward_hook(act("model.dimdown0"))
    for i in range(base.config.num_hidden_layers):
        base.get_submodule(f"model.layers.{i}.self_attn.o_proj").register_forward_hook(
            act(f"model.layers.{i}.dimdown0")
        )
        base.get_submodule(f"model.layers.{i}.mlp").register_forward_hook(act(f"model.layers.{i}.dimdown1"))
    return base


def saved_base(folder: Path, family: str, *, tied: bool) -> Path:
    build(family, tied=tied, intermediate_size=72).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "tied", "scaled", "trained_mask"),
    [("llama", False, True, True), ("gemma", True, True, True), ("llama", True, False, False)],
)
def test_the_checkpoint_is_what_the_published_code_computes(
    family: str, tied: bool, scaled: bool, trained_mask: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved_base(tmp_path / "base", family, tied=tied)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = published_tensors(base, scaled=scaled, trained_mask=trained_mask)
    adapter = write_published(tmp_path / "adapter", folder, tensors)
    kept = [] if trained_mask else ["--pruned_hidden_size", str(NUM_KEPT)]
    out = tmp_path / "out"
    assert main(["convert", "--adapter", str(adapter), "--output_dir", str(out), *kept]) == 0
    assert "hidden size 32, 3 of them zeros" in capsys.readouterr().out
    inputs = batch(2, 12)
    dense: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        before = base(**inputs).logits
        expected = as_published(base, tensors, NUM_KEPT)(**inputs).logits
        found = dense(**inputs).logits
    assert (found - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 0.1  # the adapter does something
    record = json.loads((out / "results.json").read_text())
    assert (record["command"], record["num_kept"], record["num_padded"]) == ("convert", NUM_KEPT, 3)
    assert record["warnings"]


def test_what_is_not_such_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = saved_base(tmp_path / "base", "llama", tied=False)
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    tensors = published_tensors(base, scaled=True, trained_mask=False)

    def refused(label: str, words: str, changed: dict[str, Tensor], *flags: str, **fields: Any) -> None:
        adapter = write_published(tmp_path / label, folder, changed, **fields)
        with pytest.MonkeyPatch.context() as patch:
            said: list[str] = []
            patch.setattr("builtins.print", lambda *parts, **_: said.append(" ".join(map(str, parts))))
            status = main(["convert", "--adapter", str(adapter), "--output_dir", str(tmp_path / "out"), *flags])
        assert status == 2 and len(said) == 1 and words in said[0], said
        assert not (tmp_path / "out").exists()

    size = ("--pruned_hidden_size", "28")
    lora_alone = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    refused("plain", "no dimdown tensors", lora_alone, *size)
    refused("frozen", "does not say how many channels", tensors)
    refused("odd", "does not write", tensors | {"model.dimdown0.dimdown_other.weight": torch.ones(1)}, *size)
    refused("rank", "does not fit the base model", tensors, *size, r=LORA_RANK + 1)
    refused(
        "broken", "not finite", tensors | {"model.dimdown0.dimdown_scale.weight": torch.full((1, 48), torch.nan)}, *size
    )
    refused("altered base", "expected LoRA that leaves", tensors, *size, init_lora_weights="pissa")
    refused("wide", "no smaller hidden size", tensors, "--pruned_hidden_size", "47")
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.2.dimdown" not in name}
    refused("fewer", "at 5 places", fewer, *size)
    short = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.down_proj.lora" not in name}
    refused("short", "lacks 2 of LoRA's tensors", short, *size)
    whole = {"model.layers.0.dimdown0.dimdown_inout.0.weight": torch.ones(RANK, 48, dtype=torch.int8)}
    refused("integers", "holds torch.int8; expected numbers of 16 bits", tensors | whole, *size)
    second = {"model.layers.0.dimdown0.dimdown_mask.mask": torch.ones(1, 1, 48)}
    refused("another mask", "which the published code does not write", tensors | second, *size)


@pytest.mark.parametrize(
    ("family", "words"), [("gemma2", "norms behind"), ("olmo2", "norms behind"), ("mixtral", "a mixture")]
)
def test_a_family_in_which_the_published_code_knows_no_place_is_refused(
    family: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved_base(tmp_path / "base", family, tied=False)
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    adapter = write_published(tmp_path / "a", folder, published_tensors(base, scaled=True, trained_mask=True))
    assert main(["convert", "--adapter", str(adapter), "--output_dir", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_trained_mask_says_itself_how_many_stay(tmp_path: Path) -> None:
    folder = saved_base(tmp_path / "base", "llama", tied=False)
    base: Any = AutoModelForCausalLM.from_pretrained(folder)
    tensors = published_tensors(base, scaled=False, trained_mask=True)
    published = read_published(write_published(tmp_path / "adapter", folder, tensors))
    assert int(published.keep(None).sum()) == NUM_KEPT
    with pytest.raises(PatError, match=r"Got pruned_hidden_size=30, but the adapter's mask keeps 29"):
        published.keep(30)
