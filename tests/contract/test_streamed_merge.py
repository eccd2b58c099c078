"""`pat merge` streams: what it writes is bit for bit what `merge_and_unload` gives, in any dtype and whatever the size.

That it does so in every family is asked in `test_families`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hardened import hardened
from safetensors.torch import load_file
from tiny_models import KINDS, batch, shallow, tiny_tokenizer
from tiny_training import largest_difference, logits
from transformers import AutoModelForCausalLM, PreTrainedModel

from pat.checkpoint import merge as merging
from pat.checkpoint.merge import MergeResult, merge
from pat.loading.tokenizer import savable_generation_config
from pat.surgery import fold
from pat.surgery.residual import model_tensors

ROUNDING = 2e-5
"""Float32 rounding on the tiny models' logits, see unit/checkpoint/test_verify.py."""


def saved_adapter(base: Path, folder: Path, **fields: Any) -> Any:
    model = hardened(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), calibration=[batch()], **fields)
    model.save_pretrained(folder)
    return model


def saved_base(folder: Path, family: str, **fields: Any) -> Path:
    shallow(family, **fields).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def merged(folder: Path, name: str = "out", **options: Any) -> MergeResult:
    """Merge the adapter in a folder, verified on little text."""
    text = folder / "text"
    text.write_text("Verified on little text. " * 4)
    return merge(folder / "adapter", folder / name, text_file=text, progress=False, **options)


@pytest.fixture(autouse=True)
def streamed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("merged in memory")

    monkeypatch.setattr(merging, "load_adapted", refuse)


def assert_same(folder: Path, dense: PreTrainedModel, reference: Path) -> None:
    """Weights, configuration and what stock transformers makes of them are those of the model merged in memory."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    expected = model_tensors(dense)
    assert {name: t.dtype for name, t in model_tensors(loaded).items()} == {n: t.dtype for n, t in expected.items()}
    for name, tensor in model_tensors(loaded).items():
        assert torch.equal(tensor, expected[name]), name
    if dense.generation_config is not None:
        dense.generation_config = savable_generation_config(dense.generation_config)
    dense.save_pretrained(reference)
    written = json.loads((folder / "config.json").read_text())
    plain = json.loads((reference / "config.json").read_text())
    for name in {"rope_scaling", *dense.config.attribute_map} - plain.keys():  # for transformers 4
        written.pop(name, None)
    assert written == plain
    generation = "generation_config.json"
    assert json.loads((folder / generation).read_text()) == json.loads((reference / generation).read_text())


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tiny tensors go the way of large ones, folded in several parts."""
    monkeypatch.setattr(fold, "CHUNK_ELEMENTS", 7 * 48)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize(("family", "tied", "rotation", "dtype"), [
    ("llama", False, "none", "float32"), ("llama", True, "pca", "bfloat16"), ("gemma", True, "none", "bfloat16"),
    ("qwen3", False, "pca", "float32"), ("mixtral", False, "none", "bfloat16"), ("qwen3_moe", False, "pca", "float32"),
    ("apertus", False, "none", "bfloat16"),
])  # fmt: skip
def test_large_tensors_are_folded_in_parts(family: str, tied: bool, rotation: str, dtype: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", family, tied=tied, dtype=getattr(torch, dtype))
    model = saved_adapter(base, tmp_path / "adapter", rotation=rotation)
    merged(tmp_path, fold_dtype="float64")
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")


@pytest.mark.parametrize(("family", "rotation"), [(family, "auto" if family == "phi3" else "none") for family in KINDS])
def test_a_base_in_bfloat16(family: str, rotation: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", family, tied=rotation == "none", dtype=torch.bfloat16)
    model = saved_adapter(base, tmp_path / "adapter", rotation=rotation)
    result = merged(tmp_path, fold_dtype="float64")
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")
    assert result.parity.dtype == "bfloat16"


VARIANTS: dict[str, dict[str, Any]] = {
    "untie": {"untie_word_embeddings": True, "rotation": "pca"},
    "saved-ends": {"modules_to_save": ["embed_tokens", "lm_head"], "untie_word_embeddings": True},
    "saved-norm": {"modules_to_save": ["norm"], "rotation": "none"},
    "saved-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "rotation": "none"},
    "tokens": {"trainable_token_indices": [5, 6], "untie_word_embeddings": True},
    "some": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_options_of_adapters(variant: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", tied=True, dtype=torch.bfloat16)
    model = saved_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    merged(tmp_path, fold_dtype="float64")
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_files_are_those_of_a_stock_model(family: str, tmp_path: Path) -> None:
    """Down to the byte, which a file of a model made from scratch has: names of a hub checkpoint, not of the memory."""
    base = saved_base(tmp_path / "base", family, tied=False)
    saved_adapter(base, tmp_path / "adapter")
    merged(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stock.save_pretrained(tmp_path / "stock")
    files = [(tmp_path / name / "model.safetensors") for name in ("out", "stock")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if family == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in load_file(files[0])


def test_another_dtype_than_the_base(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "gemma", tied=True)
    model = saved_adapter(base, tmp_path / "adapter")
    merged(tmp_path, dtype="float16", fold_dtype="float64")
    assert_same(tmp_path / "out", model.merge_and_unload(dtype=torch.float16), tmp_path / "reference")


def test_folding_in_float32(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", tied=True)
    model = saved_adapter(base, tmp_path / "adapter", rotation="pca", use_rslora=False)
    merged(tmp_path, fold_dtype="float32")
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
    merged(tmp_path)
    merged(tmp_path, "given", fold_dtype=folded_in)
    merged(tmp_path, "exact", fold_dtype="float64")
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
    merged(tmp_path)
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")


def test_an_adapter_that_holds_the_embedding_is_merged_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peft writes such an adapter after `resize_token_embeddings`, and when it is asked to."""
    monkeypatch.undo()
    base = saved_base(tmp_path / "base", "llama", tied=False)
    model = saved_adapter(base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged(tmp_path)
    assert_same(tmp_path / "out", model.merge_and_unload(), tmp_path / "reference")
