"""What a PEFT user may set: with each option the adapter is trained, merged and the dense model is the masked one."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.layer import LoraVariant
from tiny_models import batch, shallow
from tiny_training import Trained, attach, largest_difference, logits, train_and_merge, tuner_of

from pat.errors import PatError
from pat.report.records import collected_warnings

PARITY = 1e-4

HALF_PARITY = {torch.bfloat16: 0.25, torch.float16: 0.03}
"""Some thirty roundings, of weights and activations, of 2^-8 respectively 2^-11 of values up to four."""

SAMPLE = ("llama", "gemma3_text", "qwen3_moe")
"""A plain family, one with post-norms and a scaled embedding, one with experts and a q/k-norm."""


def check(trained: Trained, record_property: Any) -> None:
    difference = largest_difference(trained.masked_logits, trained.dense_logits)
    record_property("max_logit_difference", difference)
    assert largest_difference(trained.masked_logits, trained.base_logits) > 0.3
    assert difference <= PARITY
    with trained.model.disable_adapter():
        assert torch.equal(logits(trained.model), trained.base_logits)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank-1-operator": {"operator_rank": 1},
    "full-rank-operator": {"operator_rank": 48},
    "default-operator": {"operator_rank": None},
    "rslora-dora": {"use_rslora": True, "use_dora": True},
    "a-quarter-left": {"pruned_hidden_size": 12},
    "hardly-pruned": {"pruning_ratio": 0.01, "pruned_hidden_size": None},
    "dropout": {"lora_dropout": 0.2},
    "one-target": {"target_modules": ["q_proj"]},
    "readers-only": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "some-layers": {"target_modules": ["o_proj", "v_proj"], "layers_to_transform": [1]},
    "rank-pattern": {"rank_pattern": {"q_proj": 2, "o_proj": 7}, "alpha_pattern": {"o_proj": 1}},
    "excluded": {"exclude_modules": ["o_proj"]},
    "saved-norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "saved-writer": {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
    "gaussian-init": {"init_lora_weights": "gaussian"},
    "trainable-tokens": {"trainable_token_indices": [1, 5, 77]},
    "milestone-at-the-end": {"milestone": 1.0},
    "milestone-at-the-first-step": {"milestone": 0.25},
    "velora": {"target_modules": ["q_proj", "o_proj"], "velora_config": VeloraConfig()},
    "monteclora": {"target_modules": ["q_proj", "o_proj"], "monteclora_config": MontecloraConfig()},
    "mica": {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": "mica"},
}


@pytest.mark.parametrize(("option", "family"), list(zip(OPTIONS, itertools.cycle(SAMPLE))))
def test_option(option: str, family: str, record_property: Any) -> None:
    """Each on one family; those that `test_families` has for every family are not here."""
    fields = {"rotation": "none"} | OPTIONS[option]
    check(train_and_merge(shallow(family, tied=family != "llama"), **fields), record_property)


@pytest.mark.parametrize(
    ("family", "rotation"), [("llama", "auto"), ("gemma3_text", "none"), ("qwen3_moe", "none"), ("gemma", "auto")]
)
def test_untying_gives_the_head_a_matrix_of_its_own(family: str, rotation: str, record_property: Any) -> None:
    trained = train_and_merge(shallow(family, tied=True), untie_word_embeddings=True, rotation=rotation)
    check(trained, record_property)
    dense = trained.dense
    assert dense.config.tie_word_embeddings is False
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight
    assert trained.tuner.model.lm_head.weight is trained.tuner.model.model.embed_tokens.weight
    assert torch.equal(trained.fresh_logits, trained.base_logits)


@pytest.mark.parametrize(
    ("tied", "fields"),
    [
        (False, {"modules_to_save": ["lm_head"]}),
        (False, {"modules_to_save": ["embed_tokens"]}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
        (False, {"target_modules": ["embed_tokens", "q_proj"]}),
        (True, {"untie_word_embeddings": True, "modules_to_save": ["lm_head"]}),
        (True, {"untie_word_embeddings": True, "modules_to_save": ["embed_tokens"]}),
        (True, {"untie_word_embeddings": True, "target_modules": ["embed_tokens", "q_proj"]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (True, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ],
    ids=str,
)
def test_training_the_ends_of_the_stream(tied: bool, fields: dict[str, Any], record_property: Any) -> None:
    """In a family that scales its embeddings and is rotated."""
    trained = train_and_merge(shallow("gemma", tied=tied), rotation="auto", **fields)
    check(trained, record_property)
    names = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    assert any("embed_tokens" in name or "lm_head" in name for name in names)
    stays_tied = tied and not fields.get("untie_word_embeddings")
    assert (trained.dense.lm_head.weight is trained.dense.model.embed_tokens.weight) == stays_tied


@pytest.mark.parametrize(
    ("family", "targets", "parameters"),
    [
        ("mixtral", None, ["mlp.experts.gate_up_proj"]),
        ("qwen3_moe", None, ["mlp.experts.down_proj"]),
        ("mixtral", ["q_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("qwen3_moe", None, []),
    ],
)
def test_experts(family: str, targets: Any, parameters: list[str], record_property: Any) -> None:
    trained = train_and_merge(
        shallow(family, tied=True), rotation="pca", target_modules=targets, target_parameters=parameters
    )
    check(trained, record_property)
    adapted = {name for name, _ in trained.model.named_parameters() if "experts" in name and "lora_B" in name}
    assert bool(adapted) == bool(parameters)


def test_dora_leaves_the_experts_out_with_a_warning(record_property: Any) -> None:
    with collected_warnings() as said:
        trained = train_and_merge(shallow("mixtral", tied=True), use_dora=True, rotation="none")
    assert any("expert parameters" in message for message in said)
    check(trained, record_property)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_lora_with_a_bias(targets: Any, record_property: Any) -> None:
    trained = train_and_merge(shallow("granite", tied=True), rotation="auto", lora_bias=True, target_modules=targets)
    assert any(p.any() for name, p in trained.model.named_parameters() if name.endswith("lora_B.default.bias"))
    check(trained, record_property)


@pytest.mark.parametrize(
    ("family", "targets"), [("gemma3_text", None), ("qwen2", "all-linear"), ("mistral", ["q_proj"])]
)
def test_lora_with_a_bias_that_nothing_could_be_merged_into_is_refused(family: str, targets: Any) -> None:
    with pytest.raises(PatError, match=r"lora_bias=True.*has no bias in this model"):
        train_and_merge(shallow(family, tied=True), lora_bias=True, target_modules=targets)


@pytest.mark.parametrize(
    "fields", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": KasaConfig()}], ids=str
)
def test_initialisations_that_change_the_base_merge_exactly(fields: dict[str, Any], record_property: Any) -> None:
    """peft subtracts the initial product from the base weights; only its own unload() knows the way back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = train_and_merge(shallow("llama", tied=True), rotation="none", **fields)
    difference = largest_difference(trained.masked_logits, trained.dense_logits)
    record_property("max_logit_difference", difference)
    assert difference <= PARITY


def test_a_variant_without_a_merged_form_is_refused() -> None:
    """Those that peft has now are refused before training; this is one that a later peft may have."""
    model = attach(shallow("llama", tied=True), rotation="none", target_modules=["q_proj"], use_dora=True)
    tuner_of(model).set_step(1, 1)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.lora_variant["default"] = LoraVariant()  # whose methods raise NotImplementedError
    with pytest.raises(PatError, match=r"layers\.1\.self_attn\.q_proj.*no merged form"):
        model.merge_and_unload()


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
@pytest.mark.parametrize("family", SAMPLE)
def test_half_precision_bases(family: str, tied: bool, dtype: torch.dtype, record_property: Any) -> None:
    """Both models round everywhere, in different places: what is left is the resolution of the dtype."""
    pruned = 40 if family == "qwen3_moe" else 36
    # 40, not 36: the experts' kernel wants rows of a multiple of 16 bytes.
    trained = train_and_merge(shallow(family, tied=tied, dtype=dtype), rotation="auto", pruned_hidden_size=pruned)
    assert {parameter.dtype for parameter in trained.dense.parameters()} == {dtype}
    by_token = (trained.masked_logits.float() - trained.dense_logits.float()).abs().amax(-1)
    # A token between two experts may go to the other one for a rounding: it is then another function of it.
    difference = float(by_token.quantile(0.9) if family == "qwen3_moe" else by_token.max())
    record_property("max_logit_difference_half", difference)
    assert difference <= HALF_PARITY[dtype]
    assert largest_difference(trained.masked_logits, trained.base_logits) > 0.5


def test_the_dense_model_can_be_asked_for_in_another_dtype() -> None:
    trained = train_and_merge(shallow("llama", tied=True), rotation="pca")
    model: PeftModel = trained.model
    for dtype in (torch.bfloat16, torch.float64):
        dense = model.merge_and_unload(dtype=dtype)
        assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
        assert dense.config.dtype == dtype
    assert largest_difference(logits(dense, batch()), trained.masked_logits) < 1e-5
