"""Loading a base: in the dtype of its files, complete, and quantised if its files are."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import batch, build
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pat.errors import PatError
from pat.loading import load_base, load_config, stored_dtype
from pat.surgery.describe import count_parameters


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    found = load_file(path) | tensors
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("stored", "said"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", None)])
def test_the_dtype_is_that_of_the_files(stored: str, said: str | None, tmp_path: Path) -> None:
    build("llama", tied=True, dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    edit(tmp_path, dtype=said)
    assert stored_dtype(load_config(str(tmp_path))[0]) == getattr(torch, stored)
    assert load_base(str(tmp_path)).dtype == getattr(torch, stored)
    assert load_base(str(tmp_path), dtype="float64").dtype == torch.float64


def test_without_safetensors_it_is_what_the_configuration_says(tmp_path: Path) -> None:
    build("llama", tied=True, dtype=torch.bfloat16).config.save_pretrained(tmp_path)
    edit(tmp_path, dtype="bfloat16")
    assert stored_dtype(load_config(str(tmp_path))[0]) == torch.bfloat16


def test_a_weight_that_is_missing(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    change(tmp_path, **{"model.norm.weight": None})
    with pytest.raises(PatError, match=r"not complete: 1 are missing .* such as model\.norm\.weight"):
        load_base(str(tmp_path))


def test_a_head_that_is_missing(tmp_path: Path) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(PatError, match=r"no lm_head\.weight, .* set that to true"):
        load_base(str(tmp_path))


def test_tensors_that_are_not_used_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build("llama", tied=True).save_pretrained(tmp_path)
    change(tmp_path, extra=torch.ones(2), other=torch.ones(2))
    with caplog.at_level(logging.WARNING, logger="pat"):
        load_base(str(tmp_path))
    assert "2 tensors of the model" in caplog.text and "such as extra" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_saved_in_4_bits(double: bool, tmp_path: Path) -> None:
    """Its dtype and number of parameters are those of the weights it stands for, and its layout can be trained on."""
    plain = build("llama", tied=True, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=quantization).save_pretrained(
        tmp_path / "packed"
    )
    config, _ = load_config(str(tmp_path / "packed"))
    assert stored_dtype(config) == torch.bfloat16
    assert count_parameters(config) == plain.num_parameters()
    model = load_base(str(tmp_path / "packed"))
    model(**batch())  # which repacks weights on some processors
    assert {getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules()} == {False}
