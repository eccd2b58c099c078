"""`pat merge` streams: what it writes is bit for bit what `merge_and_unload` gives, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hardened import hardened
from safetensors.torch import load_file
from tiny_models import FAMILIES, batch, build, tiny_tokenizer
from tiny_training import largest_difference, logits
from transformers import AutoModelForCausalLM, PreTrainedModel

from pat.checkpoint import merge as merging
from pat.checkpoint.merge import merge
from pat.families import get_family
from pat.loading.tokenizer import savable_generation_config

ROUNDING = 2e-5
"""Float32 rounding on the tiny models' logits, see unit/export/test_verify.py."""

CASES = [
    pytest.param(family, tied, rotation, dtype, id=f"{family}-{'tied' if tied else 'untied'}-{rotation}-{dtype}")
    for family in FAMILIES
    for tied in (True, False)
    for rotation in ("none", "pca")
    for dtype in ("float32", "bfloat16")
    if (rotation == "none" or not get_family(family).has_post_norms)
    and (dtype == "float32" or tied == (rotation == "none"))  # half of them is enough in bfloat16
]


def saved_adapter(base: Path, folder: Path, **fields: Any) -> Any:
    model = hardened(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), calibration=[batch()], **fields)
    model.save_pretrained(folder)
    return model


def saved_base(folder: Path, family: str, **fields: Any) -> Path:
    build(family, **fields).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def streamed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("merged in memory")

    monkeypatch.setattr(merging, "load_adapted", refuse)


def assert_same(folder: Path, dense: PreTrainedModel, reference: Path) -> None:
    """Weights, configuration and what stock transformers makes of them are those of the model merged in memory."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    expected = dict(dense.named_parameters())
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {n: p.dtype for n, p in expected.items()}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    if dense.generation_config is not None:
        dense.generation_config = savable_generation_config(dense.generation_config)
    dense.save_pretrained(reference)
    written = json.loads((folder / "config.json").read_text())
    expected_config = json.loads((reference / "config.json").read_text())
    assert {name: value for name, value in written.items() if name != "rope_scaling"} == expected_config
    assert json.loads((folder / "generation_config.json").read_text()) == json.loads(
        (reference / "generation_config.json").read_text()
    )


@pytest.mark.parametrize(("family", "tied", "rotation", "dtype"), CASES)
def test_streamed_is_merged_in_memory(family: str, tied: bool, rotation: str, dtype: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", family, tied=tied, dtype=getattr(torch, dtype))
    model = saved_adapter(base, tmp_path / "adapter", rotation=rotation)
    result = merge(tmp_path / "adapter", tmp_path / "out", fold_dtype="float64", progress=False)
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")
    if dtype == "float32":
        assert result.parity.max_abs_logit_diff < ROUNDING
    else:
        assert result.parity.dtype == "bfloat16"


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "untie": {"untie_word_embeddings": True, "rotation": "pca"},
    "saved-ends": {"modules_to_save": ["embed_tokens", "lm_head"], "untie_word_embeddings": True},
    "saved-norm": {"modules_to_save": ["norm"], "rotation": "none"},
    "saved-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "rotation": "none"},
    "dense": {"operator_rank": "dense"},
    "frozen": {"mask": "frozen"},
    "tokens": {"trainable_token_indices": [5, 6], "untie_word_embeddings": True},
    "bias": {"lora_bias": True},
    "some": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_options_of_adapters(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", tied=True, dtype=dtype)
    model = saved_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    merge(tmp_path / "adapter", tmp_path / "out", fold_dtype="float64", progress=False)
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_files_are_those_of_a_stock_model(family: str, tmp_path: Path) -> None:
    """Down to the byte, which a file of a model made from scratch has: names of a hub checkpoint, not of the memory."""
    base = saved_base(tmp_path / "base", family, tied=False)
    saved_adapter(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stock.save_pretrained(tmp_path / "stock")
    files = [(tmp_path / name / "model.safetensors") for name in ("out", "stock")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if family == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in load_file(files[0])


def test_another_dtype_than_the_base(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "gemma", tied=True)
    model = saved_adapter(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", dtype="float16", fold_dtype="float64", progress=False)
    assert_same(tmp_path / "out", model.merge_and_unload(dtype=torch.float16), tmp_path / "reference")


def test_folding_in_float32(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", tied=True)
    model = saved_adapter(base, tmp_path / "adapter", rotation="pca")
    merge(tmp_path / "adapter", tmp_path / "out", fold_dtype="float32", progress=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    exact = model.merge_and_unload()
    assert any(not torch.equal(p, q) for p, q in zip(dense.parameters(), exact.parameters(), strict=True))
    assert largest_difference(logits(dense), logits(exact)) < ROUNDING


@pytest.mark.parametrize(
    ("dtype", "folded_in"), [("float32", "float64"), ("bfloat16", "float32"), ("float16", "float32")]
)
def test_what_is_written_decides_what_is_folded_in(dtype: str, folded_in: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", tied=True, dtype=getattr(torch, dtype))
    saved_adapter(base, tmp_path / "adapter", rotation="pca")
    merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    merge(tmp_path / "adapter", tmp_path / "given", fold_dtype=folded_in, progress=False)
    merge(tmp_path / "adapter", tmp_path / "exact", fold_dtype="float64", progress=False)
    default, given, exact = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "given", "exact"))
    assert all(torch.equal(default[name], given[name]) for name in default)
    for name, weight in exact.items():
        # Another rounding here and there, and never by more than the last place.
        spacing = torch.finfo(weight.dtype).eps * weight.float().abs() + 1e-6
        assert ((default[name].float() - weight.float()).abs() <= spacing).all(), name
        assert (default[name] != weight).float().mean() < 0.05, name


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj", "embed_tokens"], "untie_word_embeddings": True}], ids=["embedding"]
)
def test_what_cannot_be_streamed_is_merged_in_memory(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    base = saved_base(tmp_path / "base", "llama", tied=True, dtype=torch.bfloat16)
    model = saved_adapter(base, tmp_path / "adapter", **fields)
    merge(tmp_path / "adapter", tmp_path / "out", progress=False)
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")
