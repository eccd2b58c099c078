"""What is refused before anything is attached, and what an adapter's open questions are answered with."""

import copy
import dataclasses
import json
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from tiny_models import FAMILIES, build
from tiny_training import attach, logits, pat_config, tuner_of
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pat.errors import PatError
from pat.report.records import collected_warnings
from pat.tuner import PatConfig


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
    refused(model, "longrope.*with fewer heads.*4k", pruning_ratio=None, pruned_num_key_value_heads=1)


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
    refused(build("llama", tied=True), "above 0 and below 1", pruning_ratio=ratio)


@pytest.mark.parametrize("rank", [0, 49])
def test_an_operator_rank_outside_the_width_is_refused(rank: int) -> None:
    refused(build("llama", tied=True), f"operator_rank={rank}", operator_rank=rank)


# -- a configuration that was used -------------------------------------------------------------------------------------


def test_the_user_s_configuration_is_left_as_it_was_and_the_adapter_keeps_a_copy() -> None:
    base = build("llama", tied=True)
    fields = {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    config = pat_config(rotation="auto", **fields)
    before = copy.deepcopy(config)
    model = get_peft_model(base, config)
    assert config == before  # peft's own record of the base's name is the same empty one
    kept = model.peft_config["default"]
    assert kept.resolved_width == {"hidden_size": 36} and kept.resolved_rotation == "pca"
    assert kept.base_shape["hidden_size"] == 48 and kept.is_resolved and not config.is_resolved
    attention = {f"{name}_proj" for name in "qkvo"}
    assert set(kept.target_modules) == attention | {"gate_proj", "up_proj", "down_proj"}


def test_one_configuration_serves_models_of_other_sizes_families_and_precisions() -> None:
    config = pat_config(rotation="auto")
    rotations, widths = [], []
    for family, fields in (
        ("llama", {}),
        ("gemma3_text", {"hidden_size": 96}),
        ("mixtral", {"dtype": torch.bfloat16}),
        ("phi3", {}),
    ):
        model = get_peft_model(build(family, tied=True, **fields), config)
        assert logits(model).isfinite().all()
        rotations.append(model.peft_config["default"].resolved_rotation)
        widths.append(tuner_of(model).mask().pruned_hidden_size)
    assert rotations == ["pca", "none", "pca", "pca"] and widths == [36, 72, 36, 36]


def used(how: str, **fields: Any) -> PatConfig:
    """A configuration after its use: the user's own, the one the adapter keeps, or what a file of it holds."""
    config = pat_config(**fields)
    model = get_peft_model(build("llama", tied=True), config)
    kept = model.peft_config["default"]
    if how == "file":
        with tempfile.TemporaryDirectory() as folder:
            kept.save_pretrained(folder)
            return PatConfig.from_pretrained(folder, inference_mode=False)
    made: dict[str, PatConfig] = {
        "user's": config,
        "kept": kept,
        "pickle": pickle.loads(pickle.dumps(kept)),
        "copy": copy.copy(kept),
        "dict": PatConfig(**{name: value for name, value in kept.to_dict().items() if name != "peft_type"}),
    }
    return made[how]


CHANGES: list[tuple[dict[str, Any], dict[str, Any], tuple[int, str]]] = [
    ({"rotation": "auto"}, {"rotation": "none"}, (36, "none")),
    ({"rotation": "none"}, {"rotation": "pca"}, (36, "pca")),
    ({"rotation": "none"}, {"pruning_ratio": 0.5}, (24, "none")),
    ({"rotation": "none"}, {"pruned_hidden_size": 24}, (24, "none")),
    ({"rotation": "auto"}, {"gain_tolerance": 0.0}, (36, "none")),
    ({"rotation": "auto", "gain_tolerance": 0.0}, {"untie_word_embeddings": True}, (36, "pca")),
    ({"rotation": "auto"}, {"modules_to_save": ["norm"]}, (36, "none")),
    ({"rotation": "auto"}, {"r": 2}, (36, "pca")),
]
PAIRS = [
    *((*change, how) for change in CHANGES for how in ("user's", "kept")),
    *((*change, how) for change in CHANGES[:2] for how in ("file", "pickle", "copy", "dict")),
]


@pytest.mark.parametrize(("fields", "change", "expected", "how"), PAIRS, ids=str)
def test_a_changed_option_is_resolved_anew(
    fields: dict[str, Any], change: dict[str, Any], expected: tuple[int, str], how: str
) -> None:
    config = used(how, **fields)
    for changed in (dataclasses.replace(config, **change), set_attributes(copy.deepcopy(config), **change)):
        model = get_peft_model(build("llama", tied=True), changed)
        kept, mask = model.peft_config["default"], tuner_of(model).mask()
        assert (mask.pruned_hidden_size, kept.resolved_rotation) == expected
        assert (mask.basis is not None) == (expected[1] == "pca")


def set_attributes(config: PatConfig, **change: Any) -> PatConfig:
    if "pruned_hidden_size" in change:
        change = change | {"pruning_ratio": None}
    for name, value in change.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}], ids=str)
def test_a_loaded_adapter_keeps_its_width_and_rotation_whatever_the_rules_are_now(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(build("llama", tied=True), rotation="auto", pruning_ratio=0.4, **fields)
    expected = tuner_of(model).mask().pruned_hidden_size
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("pat.widths.ALIGNMENT_SLACK", 0.5)
    monkeypatch.setattr("pat.tuner.prepare.gain_block", lambda gain, tolerance: torch.zeros_like(gain).bool())
    other = attach(build("llama", tied=True), rotation="auto", pruning_ratio=0.4)
    mask = tuner_of(other).mask()
    assert mask.pruned_hidden_size != expected and mask.basis is None  # the rules have changed
    mask = tuner_of(PeftModel.from_pretrained(build("llama", tied=True), tmp_path)).mask()
    assert mask.pruned_hidden_size == expected and mask.basis is not None


def test_an_adapter_of_an_older_version_is_resolved_by_its_own_options(tmp_path: Path) -> None:
    model = attach(build("llama", tied=True), rotation="auto")
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    del stored["resolved_from"]
    asked = {name: stored[name] for name in ("pruning_ratio", "pruned_hidden_size", "multiple_of")}
    stored["resolved_width"] = {"hidden_size": 36, "base_hidden_size": 48, **asked}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    loaded = PatConfig.from_pretrained(tmp_path)
    assert loaded.is_resolved and not dataclasses.replace(loaded, rotation="none").is_resolved
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama", tied=True), tmp_path)), logits(model))
    del stored["resolved_width"]  # older still
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    assert tuner_of(PeftModel.from_pretrained(build("llama", tied=True), tmp_path)).mask().pruned_hidden_size == 36


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


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_dropout": 0.1},
        {"kasa_config": KasaConfig()},
        {"monteclora_config": MontecloraConfig()},
        *({"init_lora_weights": kind} for kind in ("pissa", "olora", "mica", "orthogonal")),
    ],
    ids=str,
)
def test_experts_are_left_out_with_a_warning_where_peft_refuses_them(fields: dict[str, Any]) -> None:
    with collected_warnings() as said:
        model = attach(build("mixtral", tied=True), **fields)
    assert ["expert parameters" in line for line in said] == [True]
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"axes": ["mlp"], "calibration_tokens": 99},
            "the hidden size is not cut: .*calibration_tokens",
        ),
        (
            {"axes": ["hidden"], "refit": False, "refit_tokens": 99},
            "the MLPs and heads are not cut: refit, refit_tokens",
        ),
        ({"axes": ["mlp"], "identity_loss_weight": 0.5}, "the hidden size is not cut: .*identity_loss_weight"),
        ({"axes": ["layers"], "multiple_of": 7}, "the hidden size and the MLPs are not cut: multiple_of"),
        ({"axes": ["mlp"], "pruned_hidden_size": 36}, r"axes=\['mlp'\] has no effect beside the sizes"),
        ({"untie_word_embeddings": True}, "untie_word_embeddings=True has no effect"),
    ],
)
def test_options_that_do_nothing_are_said(fields: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    tied = "untie_word_embeddings" not in fields
    with torch.device("meta"):
        attach(build("llama", tied=tied).to("meta"), **fields)
    assert not caplog.text  # of a model that is only counted
    attach(build("llama", tied=tied), **fields)
    assert re.search(said, caplog.text)


def test_options_that_do_something_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    attach(build("llama", tied=True), axes=["hidden", "mlp"], refit_tokens=99, calibration_tokens=99, multiple_of=4)
    attach(build("llama", tied=True), untie_word_embeddings=True, multiple_of=4)
    assert "no effect" not in caplog.text


def test_modules_that_are_not_there_are_not_passed_over() -> None:
    for names in (["nope"], ["norm", "layers.7.input_layernorm"]):
        refused(build("llama", tied=True), f"{names[-1]}', but the model has no module", modules_to_save=names)
    refused(build("llama", tied=True), "'lp', which holds model.layers.0.mlp", modules_to_save=["lp"])
    attach(build("llama", tied=True), modules_to_save=["layernorm"])  # the end of a name will do for peft


def test_a_head_of_its_own_that_is_larger_than_the_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    attach(build("llama", tied=True), axes=["mlp"], pruning_ratio=0.1, untie_word_embeddings=True)
    assert "not be smaller" not in caplog.text
    attach(build("llama", tied=True), axes=["mlp"], pruning_ratio=0.05, untie_word_embeddings=True)
    assert re.search("adds 6,144 parameters, and 3,942 are cut", caplog.text)
