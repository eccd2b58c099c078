"""What is refused before anything is attached, and what an adapter's open questions are answered with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import FAMILIES, build
from tiny_training import attach, logits, pat_config, tuner_of
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pat.errors import PatError


def refused(base: nn.Module, message: str, **fields: Any) -> None:
    """Attaching raises one line that matches `message`, and leaves the base exactly as it was."""
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(PatError, match=message) as error:
        attach(base, **fields)
    assert "\n" not in str(error.value)
    assert [name for name, _ in base.named_modules()] == names
    assert not any(module._forward_hooks for module in base.modules())


# -- the model ---------------------------------------------------------------------------------------------------------


def test_an_unsupported_family_lists_the_supported_ones() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16)
    model = AutoModelForCausalLM.from_config(config)
    refused(model, "'gpt2'.*" + ".*".join(sorted(FAMILIES)))


def test_a_model_without_a_head_is_refused() -> None:
    body = AutoModel.from_config(build("llama", tied=True).config)
    refused(body, "AutoModelForCausalLM", task_type=None)


def test_what_is_no_transformers_model_is_refused() -> None:
    refused(nn.Sequential(nn.Linear(4, 4)), "no transformers model", task_type=None)


def test_a_model_with_a_parameter_of_unknown_role_is_refused() -> None:
    model = build("llama", tied=True)
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    refused(model, r"sinks.*families\.py")


def test_a_model_with_an_adapter_already_is_refused() -> None:
    """A notebook's cell that is run twice."""
    base = build("llama", tied=True)
    model = attach(base)
    for again in (base, model):
        with pytest.raises(PatError, match=r"adapter layers already.*unload\(\).*add_adapter\(\)"):
            attach(again)
    attach(model.unload())


@pytest.mark.parametrize("family", ["phi3"])
def test_longrope_is_refused_before_any_work(family: str) -> None:
    factors = [1.0] * 2
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": factors, "long_factor": factors}
    model = build(
        family,
        tied=True,
        rope_parameters=rope | {"partial_rotary_factor": 0.5},
        max_position_embeddings=256,
    )
    refused(model, "longrope.*4k")


# -- the width ---------------------------------------------------------------------------------------------------------


def test_an_illegal_width_names_the_nearest_legal_ones() -> None:
    refused(
        build("llama", tied=True),
        r"pruned_hidden_size=37.*multiple of num_attention_heads=4.*36 and 40",
        pruned_hidden_size=37,
    )


def test_an_illegal_width_of_six_heads_too() -> None:
    refused(
        build("qwen2", tied=True),
        r"pruned_hidden_size=40.*multiple of num_attention_heads=6.*36 and 42",
        pruned_hidden_size=40,
    )


def test_a_width_that_is_not_smaller_is_refused() -> None:
    refused(build("llama", tied=True), r"pruned_hidden_size=48.*smaller", pruned_hidden_size=48)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.7, -0.1])
def test_a_ratio_outside_the_open_interval_is_refused(ratio: float) -> None:
    refused(build("llama", tied=True), "strictly between 0 and 1", pruning_ratio=ratio)


@pytest.mark.parametrize("rank", [0, 49])
def test_an_operator_rank_outside_the_width_is_refused(rank: int) -> None:
    refused(build("llama", tied=True), f"operator_rank={rank}", operator_rank=rank)


def test_the_chosen_width_is_recorded_beside_what_was_asked_for() -> None:
    config = attach(build("llama", tied=True), rotation="none").peft_config["default"]
    assert (config.pruning_ratio, config.pruned_hidden_size) == (0.25, None)
    assert config.resolved_width["hidden_size"] == 36


def test_a_loaded_adapter_keeps_its_width_whatever_the_rule_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(build("llama", tied=True), rotation="none", pruning_ratio=0.4)
    expected = tuner_of(model).mask().pruned_hidden_size
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("pat.shape.ALIGNMENT_SLACK", 0.5)
    other = attach(build("llama", tied=True), rotation="none", pruning_ratio=0.4)
    assert tuner_of(other).mask().pruned_hidden_size != expected  # the rule has changed
    loaded = PeftModel.from_pretrained(build("llama", tied=True), tmp_path)
    assert tuner_of(loaded).mask().pruned_hidden_size == expected


def test_an_adapter_without_a_record_of_its_width_chooses_it_as_before(tmp_path: Path) -> None:
    attach(build("llama", tied=True), rotation="none").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    del stored["resolved_width"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    assert tuner_of(PeftModel.from_pretrained(build("llama", tied=True), tmp_path)).mask().pruned_hidden_size == 36


@pytest.mark.parametrize("change", [{"pruning_ratio": 0.5}, {"pruning_ratio": None, "pruned_hidden_size": 24}])
def test_a_configuration_changed_after_its_first_use_gets_another_width(change: dict[str, Any]) -> None:
    config = pat_config(rotation="none")
    get_peft_model(build("llama", tied=True), config)
    model = get_peft_model(build("llama", tied=True), dataclasses.replace(config, **change))
    assert tuner_of(model).mask().pruned_hidden_size == 24


# -- the ends of the stream --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_the_head_is_refused(targets: Any, tied: bool) -> None:
    refused(build("llama", tied=tied), "lm_head.*modules_to_save", target_modules=targets)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["model.embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_on_one_end_of_a_tied_model_is_refused(fields: dict[str, Any]) -> None:
    refused(build("llama", tied=True), "untie_word_embeddings=True", **fields)
    attach(build("llama", tied=False), **fields)
    attach(build("llama", tied=True), untie_word_embeddings=True, **fields)


# -- the rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_post_norms_rule_out_a_rotation(family: str) -> None:
    refused(build(family, tied=False), "rotation='pca', but .* norms between its writers", rotation="pca")
    model = attach(build(family, tied=False), rotation="auto")
    assert model.peft_config["default"].resolved_rotation == "none"


def test_too_many_outliers_of_a_tied_model_rule_out_a_rotation() -> None:
    refused(build("llama", tied=True), r"gain_tolerance=0\.0\b", rotation="pca", gain_tolerance=0.0)
    model = attach(build("llama", tied=True), rotation="auto", gain_tolerance=0.0)
    assert model.peft_config["default"].resolved_rotation == "none"
    assert tuner_of(model).mask().basis is None
    untied = attach(build("llama", tied=False), rotation="pca", gain_tolerance=0.0)
    assert untied.peft_config["default"].resolved_rotation == "pca"


def test_a_trained_final_norm_of_a_tied_model_rules_out_a_rotation() -> None:
    refused(build("llama", tied=True), "final norm", rotation="pca", modules_to_save=["norm"])
    model = attach(build("llama", tied=True), rotation="auto", modules_to_save=["norm"])
    assert model.peft_config["default"].resolved_rotation == "none"
    attach(build("llama", tied=False), rotation="pca", modules_to_save=["norm"])


def test_without_a_rotation_nothing_is_stored_for_one() -> None:
    mask = tuner_of(attach(build("llama", tied=True), rotation="none")).mask()
    assert mask.basis is None and mask.head_factor is None


# -- another base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 96}, "hidden_size=96.*hidden_size=48"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2.*num_hidden_layers=3"),
        ({"vocab_size": 64}, "vocab_size=64.*vocab_size=128"),
        ({"intermediate_size": 40}, "intermediate_size=40.*intermediate_size=72"),
        ({"family": "mistral"}, "model_type=mistral.*model_type=llama"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_adapter_of_another_base_says_what_differs(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    attach(build("llama", tied=True), rotation="none").save_pretrained(tmp_path)
    family = other.pop("family", "llama")
    with pytest.raises(PatError, match=f"does not fit.*{message}"):
        PeftModel.from_pretrained(build(family, tied=True, **other), tmp_path)
    other["family"] = family


def test_a_configuration_can_be_used_for_several_models() -> None:
    """A sweep attaches one configuration to one model after the other."""
    config = pat_config(rotation="none")
    get_peft_model(build("llama", tied=True), config)
    model = get_peft_model(build("llama", tied=True, seed=1), config)
    assert logits(model).isfinite().all()


# -- targets -----------------------------------------------------------------------------------------------------------


def test_default_targets_are_all_linear_layers_on_the_stream() -> None:
    model = attach(build("llama", tied=False))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_default_targets_cover_the_experts() -> None:
    config = attach(build("mixtral", tied=True)).peft_config["default"]
    assert set(config.target_parameters) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    mixed = attach(build("qwen3_moe", tied=True)).peft_config["default"]
    assert {"gate_proj", "up_proj", "down_proj"} <= set(mixed.target_modules)  # its one layer without experts


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_experts_are_left_out_with_a_warning_where_peft_refuses_them(fields: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="expert parameters"):
        model = get_peft_model(build("mixtral", tied=True), pat_config(**fields))
    assert not model.peft_config["default"].target_parameters


@pytest.mark.parametrize("targets", [["q_proj"], ".*layers.1.*v_proj", "all-linear"])
def test_targets_asked_for_are_kept(targets: Any) -> None:
    model = attach(build("llama", tied=True), target_modules=targets)
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    expected = {
        "['q_proj']": {"q_proj"},
        ".*layers.1.*v_proj": {"v_proj"},
        "all-linear": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    }
    assert adapted == expected[str(targets)]
