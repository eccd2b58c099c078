"""peft's own methods do with a PAT adapter what docs/python.md says of them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from tiny_models import batch, shallow
from tiny_training import attach, largest_difference, logits, pat_config, tuner_of
from transformers import AutoModelForCausalLM, GPT2Config

from pat.errors import PatError
from pat.tuner import PatConfig

PAGE = Path(__file__).parents[3] / "docs/python.md"


def hard(**fields: Any) -> PeftModel:
    model = attach(shallow("llama", tied=False), **({"rotation": "none"} | fields))
    tuner_of(model).set_step(1, 1)
    return model.eval()


def pair() -> PeftModel:
    model = hard()
    model.add_adapter("other", pat_config(rotation="none"))
    return model


def saved(folder: Path) -> str:
    hard().save_pretrained(folder)
    return str(folder)


def load_with_another_size(folder: Path) -> None:
    config = pat_config(rotation="none", pruned_hidden_size=24)
    model = PeftModel.from_pretrained(shallow("llama", tied=False), saved(folder), config=config)
    model.merge_and_unload()


def load_with_other_options(folder: Path, **fields: Any) -> None:
    PeftModel.from_pretrained(shallow("llama", tied=False), saved(folder), config=pat_config(**fields))


def load_without(folder: Path, option: str) -> None:
    hard(**{option: True}).save_pretrained(folder)
    PeftModel.from_pretrained(shallow("llama", tied=False), folder, config=pat_config())


def load_without_memory(folder: Path) -> None:
    hard(init_lora_weights="pissa").save_pretrained(folder)
    PeftModel.from_pretrained(shallow("llama", tied=False), folder, low_cpu_mem_usage=True)


def on_gpt2() -> None:
    base = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, n_positions=8))
    get_peft_model(base, PatConfig())


IN_TRANSFORMERS = "get_peft_model" if transformers.__version__.startswith("5.23.") else "version of PEFT"
"""Message of transformers' own functions for adapters; from 5.24 on they refuse every method of peft 0.21."""

REFUSED: dict[str, list[tuple[str, Callable[[Path], Any]]]] = {
    "`merge_adapter`": [("smaller.*merge_and_unload", lambda _: hard().merge_adapter())],
    "`merge_and_unload` of several": [
        ("exactly one of.*default.*other", lambda _: pair().merge_and_unload(adapter_names=["default", "other"])),
        ("exactly one of.*default", lambda _: hard().merge_and_unload(adapter_names=["nobody"])),
    ],
    "`merge_and_unload` before the milestone": [
        ("never been trained.*PatCallback", lambda _: attach(shallow("llama", tied=False)).merge_and_unload())
    ],
    "`add_weighted_adapter`": [
        ("different channels", lambda _: pair().add_weighted_adapter(["default", "other"], [1.0, 1.0], "both"))
    ],
    "`adapter_names=[…]`": [
        ("one adapter", lambda _: pair()(**batch(), adapter_names=["default", "other"])),
        ("one adapter", lambda _: pair().generate(**batch(), adapter_names=["default", "other"])),
    ],
    "`from_pretrained(config=…)` of another size": [(r"keeps 36 entries.* says 24", load_with_another_size)],
    "`from_pretrained(config=…)` with options that have fewer tensors": [
        (r"no place for \(16, .*pat_hsm", lambda folder: load_with_other_options(folder, axes=["mlp"])),
        (r"tensors .*down_proj", lambda folder: load_with_other_options(folder, target_modules=["q_proj"])),
        ("magnitude_vector", lambda folder: load_without(folder, "use_dora")),
        (r"lora_B.*\.bias", lambda folder: load_without(folder, "lora_bias")),
    ],
    "`inject_adapter_in_model`, transformers' `add_adapter` and `load_adapter`": [
        ("get_peft_model", lambda _: inject_adapter_in_model(pat_config(), shallow("llama", tied=False))),
        (IN_TRANSFORMERS, lambda _: shallow("llama", tied=False).add_adapter(pat_config())),
        (IN_TRANSFORMERS, lambda folder: shallow("llama", tied=False).load_adapter(saved(folder))),
    ],
    "`hotswap_adapter`": [("only supports LORA", lambda folder: hotswap_adapter(hard(), saved(folder), "default"))],
    "`PeftMixedModel`, other methods beside PAT": [
        ("not compatible", lambda _: get_peft_model(shallow("llama", tied=False), pat_config(), mixed=True)),
        ("different peft types", lambda _: hard().add_adapter("lora", LoraConfig(target_modules=["q_proj"]))),
    ],
    "`layer_replication`, aLoRA, Arrow": [("layer_replication", lambda _: PatConfig(layer_replication=[(0, 1)]))],
    "PiSSA by a random `niter`, LoRA-GA, CorDA": [
        ("at random", lambda _: PatConfig(init_lora_weights="pissa_niter_4"))
    ],
    "a second adapter beside PiSSA, OLoRA or LoftQ": [
        ("changes the base", lambda _: hard(init_lora_weights="pissa").add_adapter("other", pat_config())),
        ("changes the base", lambda _: hard().add_adapter("other", pat_config(init_lora_weights="OLoRA"))),
    ],
    "`low_cpu_mem_usage` with PiSSA, OLoRA or LoftQ": [("leave low_cpu_mem_usage out", load_without_memory)],
    "LoRA on `lm_head`": [("lm_head", lambda _: attach(shallow("llama", tied=False), target_modules=["lm_head"]))],
    "an adapter on one end of a tied model": [
        ("break the tie", lambda _: attach(shallow("llama", tied=True), target_modules=["embed_tokens"])),
        ("break the tie", lambda _: attach(shallow("llama", tied=True), modules_to_save=["lm_head"])),
    ],
    "models without a record": [("'gpt2'.*LayerNorm", lambda _: on_gpt2())],
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_is_refused_as_peft_promises(method: str, tmp_path: Path) -> None:
    for number, (message, call) in enumerate(REFUSED[method]):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message) as error:
            warnings.simplefilter("ignore")
            call(tmp_path / str(number))
        assert "\n" not in str(error.value)


def test_the_page_lists_just_what_is_refused() -> None:
    rows = re.findall(r"^\| (.+?) \| refused", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*REFUSED, "`convert_to_lora`"]


def test_a_pruned_model_is_no_lora() -> None:
    model = hard()
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)


def test_a_refused_second_adapter_leaves_nothing_behind() -> None:
    model = hard()
    before = logits(model)
    with pytest.raises(PatError, match="pruned_hidden_size=7"):
        model.add_adapter("other", pat_config(pruned_hidden_size=7))
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert not any(".other." in name for name in model.state_dict())
    assert torch.equal(logits(model), before)


def test_peft_s_status_names_the_method() -> None:
    assert hard().get_model_status().peft_types == {"default": "PAT"}


def test_the_base_s_weights_are_told_from_the_adapter_s() -> None:
    base = shallow("llama", tied=False)
    before = copy.deepcopy(base.state_dict())
    model = attach(base, axes=["hidden", "mlp"], rotation="none")
    found = get_base_model_state_dict(model)
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(1.0)
    result = set_base_model_state_dict(model, before, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    found = get_base_model_state_dict(model)
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_a_configuration_is_copied_so_that_it_can_be_used_again() -> None:
    config = pat_config()
    models = [get_peft_model(shallow(family, tied=False), config) for family in ("llama", "mixtral")]
    assert all(model.peft_config["default"] is not config for model in models)
    assert config.target_modules is config.base_shape is None


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("cut", ["hidden", "mlp"])
def test_gradients_reach_all_of_the_adapter_and_nothing_else(cut: str, use_reentrant: bool) -> None:
    """Gradients are the same with and without gradient checkpointing, and PAT's own parameters lack peft's prefix."""
    model = attach(shallow("gemma3_text", tied=True), axes=[cut]).train()
    tuner_of(model).set_step(0, 2)
    plain = gradients(model)
    assert any(".pat_" in name for name in plain) and any(model.prefix in name for name in plain)
    assert model.get_input_embeddings()(batch()["input_ids"]).requires_grad == (cut == "hidden")
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    assert all(largest_difference(plain[name], checkpointed[name]) <= 1e-5 for name in plain)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    own = {name: parameter for name, parameter in model.named_parameters() if ".default." in name}
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in own.values())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in own)
    return {name: parameter.grad.clone() for name, parameter in own.items()}
