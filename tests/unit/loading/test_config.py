"""Configurations that cannot be used are refused in one line that names the field and its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pat.errors import PatError
from pat.loading import check_quantization, load_base, load_config
from pat.tuner import PatConfig


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    build("llama", tied=False, num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def base(origin: Path, tmp_path: Path) -> Path:
    """A copy of a good model: files that are not to be changed are the same ones."""
    (tmp_path / "config.json").write_text((origin / "config.json").read_text())
    (tmp_path / "model.safetensors").hardlink_to(origin / "model.safetensors")
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of the configuration, or remove those that are ellipses."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(folder: Path) -> str:
    with pytest.raises(PatError) as caught:
        load_config(str(folder))
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 5}, ["hidden_size=48", "num_attention_heads=5", "not a multiple"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers=-1", "positive"]),
        ({"head_dim": 0}, ["head_dim=0", "positive"]),
        ({"vocab_size": -5}, ["vocab_size=-5", "positive"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps=-1.0", "at least 0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan", "at least 0"]),
        ({"attention_dropout": 2.0}, ["attention_dropout=2.0", "less than 1"]),
        ({"rms_norm_eps": "1e-5"}, ["'rms_norm_eps' expected float", "'1e-5'"]),
        ({"tie_word_embeddings": "true"}, ["'tie_word_embeddings' expected bool", "'true'"]),
        ({"hidden_act": "nonsense"}, ["hidden_act='nonsense'"]),
        ({"dtype": "nonsense"}, ["dtype='nonsense'"]),
        ({"dtype": "int8"}, ["dtype=torch.int8", "float32"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype=torch.float8_e4m3fn"]),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, ["rope_parameters=", "'nonsense'"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["rope_parameters", "factor"]),
        ({"return_dict": False}, ["return_dict=False", "true"]),
        ({"rope_parameters": ..., "rope_theta": "abc"}, ["rope_theta='abc'"]),
        ({"pad_token_id": 999}, ["pad_token_id=999", "vocab_size=128"]),
        ({"eos_token_id": [2, 999]}, ["eos_token_id=[2, 999]", "vocab_size=128"]),
        ({"bos_token_id": -3}, ["bos_token_id=-3"]),
        ({"quantization_config": {}}, ["quantization_config={}", "quant_method"]),
        ({"quantization_config": {"quant_method": "nonsense"}}, ["nonsense", "quant_method"]),
        ({"quantization_config": "4bit"}, ["quantization_config='4bit'"]),
        ({"model_type": "nonsense"}, ["nonsense"]),
        ({"model_type": ...}, ["model_type"]),
        # What is right by itself, but not beside these weights:
        ({"vocab_size": 64}, ["model.embed_tokens.weight", "(128, 48)", "(64, 48) by vocab_size=64"]),
        ({"intermediate_size": 80}, ["intermediate_size=80"]),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ["not quantised"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(fields: dict[str, Any], words: list[str], base: Path) -> None:
    edit(base, **fields)
    message = refused(base)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("content", ["[]", '"x"', "null", "", "{broken", "{}"])
def test_a_configuration_that_is_none(content: str, base: Path) -> None:
    (base / "config.json").write_text(content)
    assert "The configuration of the model" in refused(base)


@pytest.mark.parametrize(
    "fields", [{"pad_token_id": -1}, {"pad_token_id": None, "eos_token_id": None}, {"dtype": None}]
)
def test_what_can_be_used_is_not_refused(fields: dict[str, Any], base: Path) -> None:
    edit(base, **fields)
    load_config(str(base))


def test_a_model_with_an_adapter_in_its_folder_is_refused(base: Path) -> None:
    """transformers would put it on the model, of which one part of a run then is measured and another trained."""
    (base / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in refused(base)


def test_of_an_adapter_the_model_of_its_run_is_named(tmp_path: Path) -> None:
    """Also of one in a folder below, as checkpoints and the compact model's are, whose own base is no result."""
    adapter, merge = tmp_path / "compact" / "adapter", "pat merge --adapter"
    (adapter.parent / "model").mkdir(parents=True)
    (adapter.parent / "model" / "config.json").write_text("{}")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds an adapter and no model; merge it into its base (peft's merge_and_unload" in refused(adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "PAT"}')
    assert f"no model; make a model of it with `{merge} {adapter} --output_dir MODEL` and pass that" in refused(adapter)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    said = refused(adapter)
    assert f"pass {tmp_path / 'model'}, the model of its run, or make" in said and f"{merge} {adapter}" in said


def test_a_misspelt_folder_is_answered_with_one_like_it(base: Path) -> None:
    assert f"no such folder (did you mean {base}" in refused(base.with_name(f"{base.name}e"))


def test_layers_that_the_configuration_has_no_place_for(base: Path) -> None:
    """Without a word transformers would load half a model."""
    edit(base, num_hidden_layers=1)
    with pytest.raises(PatError, match=r"hold \d+ tensors .* model\.layers\.1\.\S+, with num_hidden_layers=1"):
        load_base(str(base))


def test_weights_in_a_format_of_their_own(base: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    message = refused(base)
    assert name in message and "how they are quantised" in message


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_quantisation_that_cannot_be_trained_on(method: str, base: Path) -> None:
    (base / "model.safetensors").unlink()
    edit(base, quantization_config={"quant_method": method, "bits": 4})
    config, _ = load_config(str(base))
    with pytest.raises(PatError, match=f"quantised by {method}; expected .* bitsandbytes"):
        check_quantization(config)


TEXT = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def multimodal(kind: str, architecture: str, **parts: Any) -> Any:
    return AutoConfig.for_model(kind, architectures=[architecture], **parts)


MULTIMODAL = {
    "gemma3": ("Gemma3ForConditionalGeneration", {"text_config": TEXT, "vision_config": VISION}, "'gemma3_text'"),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": VISION | {"model_type": "pixtral"}},
        "'mistral'",
    ),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {"text_config": TEXT}, "phi3, qwen2, qwen3"),
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_model_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    architecture, parts, supported = MULTIMODAL[kind]
    multimodal(kind, architecture, **parts).save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert f"{architecture} (text and images)" in message
    assert supported in message
    assert "families.py" not in message


def test_a_multimodal_model_in_memory_is_refused_by_name() -> None:
    architecture, parts, _ = MULTIMODAL["gemma3"]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(multimodal("gemma3", architecture, **parts))
    with pytest.raises(PatError, match=r"Gemma3ForConditionalGeneration .*text and images.* 'gemma3_text'"):
        get_peft_model(model, PatConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_text_model_taken_out_of_a_multimodal_one_is_the_same(kind: str, tmp_path: Path) -> None:
    """The step of docs/multimodal.md."""
    architecture, parts, _ = MULTIMODAL[kind]
    small = {"image_size": 16, "patch_size": 8} | ({} if kind == "gemma3" else {"head_dim": 8})
    parts = parts | {"vision_config": parts["vision_config"] | small}
    AutoModelForImageTextToText.from_config(multimodal(kind, architecture, **parts)).save_pretrained(tmp_path / "whole")

    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype="auto")
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
    text.model.load_state_dict(whole.get_decoder().state_dict())
    text.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())
    text.save_pretrained(tmp_path / "text")

    load_config(str(tmp_path / "text"))
    loaded = load_base(str(tmp_path / "text"))
    ids = torch.randint(4, 90, (1, 20))
    assert torch.equal(loaded(ids).logits, whole.eval()(ids).logits)
