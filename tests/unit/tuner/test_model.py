"""PAT as a PEFT method: attaching, switching, second adapters, copies, what is trained, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import batch, build
from tiny_training import Float64, attach, largest_difference, logits, pat_config, tuner_of
from torch import nn

from pat.errors import PatError
from pat.tuner import find_tuner
from pat.tuner.layer import HsmLayer, MaskLayer

KEPT = 36

FAMILY_SAMPLE = ("llama", "gemma3_text", "mixtral")
"""A plain one, one with post-norms and a scaled embedding, one with experts."""


@torch.no_grad()
def stir(model: nn.Module, adapter: str = "default", seed: int = 5) -> None:
    """Move every parameter of an adapter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name or name.endswith(f".{adapter}"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def hard_model(family: str = "llama", *, tied: bool = True, rotation: str = "auto", **fields: Any) -> PeftModel:
    model = attach(build(family, tied=tied), rotation=rotation, **fields)
    tuner = tuner_of(model)
    if tuner.needs_calibration():
        tuner.calibrate([batch(seed=3, batch_size=8)] * 2)
    stir(model)
    tuner.set_step(1, 1)
    return model.eval()


def add_adapter(model: PeftModel, name: str, **fields: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, pat_config(**fields))


# -- attaching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
@pytest.mark.parametrize("family", FAMILY_SAMPLE)
def test_operators_sit_on_every_writer_whatever_lora_targets(family: str, targets: Any) -> None:
    tuner = tuner_of(attach(build(family, tied=True), target_modules=targets))
    assert len(tuner.operators()) == 1 + 2 * 3
    assert len({id(operator) for operator in tuner.operators().values()}) == 7


def test_one_mask_serves_all_writers() -> None:
    model = attach(build("llama", tied=True))
    masks = [name for name, _ in model.named_parameters() if "pat_mask" in name]
    assert masks == ["base_model.model.model.pat_mask.masks.default.weight"]


def test_the_multipliers_reach_mask_and_operators() -> None:
    """One step of Adam moves what is multiplied that many times further than the learning rate."""
    fields = {"rotation": "none", "mask_lr_multiplier": 3.0, "operator_lr_multiplier": 7.0}
    model = attach(build("llama", tied=True), **fields).train()
    tuner, rate = tuner_of(model), 1e-4
    tuner.set_step(0, 4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    optimizer.step()
    assert tuner.mask().proxy_weights().abs().median().item() == pytest.approx(3 * rate, rel=1e-2)
    for site, operator in tuner.operators().items():
        assert operator.v().abs().median().item() == pytest.approx(7 * rate, rel=1e-2), site


def test_the_tuner_is_found_and_its_methods_reached_through_the_peft_model() -> None:
    model = attach(build("llama", tied=True))
    assert find_tuner(model) is model.base_model is find_tuner(nn.Sequential(model))
    assert find_tuner(build("llama", tied=True)) is None
    model.set_step(0, 4)
    assert model.regularizers().keys() == {"active", "identity"}


def test_only_the_adapter_is_trainable_and_all_of_it() -> None:
    model = attach(build("llama", tied=True))
    for name, parameter in model.named_parameters():
        ours = any(part in name for part in ("lora_", "pat_mask", "pat_hsm"))
        assert parameter.requires_grad == ours, name
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mask_and_operators_are_float32_on_a_half_precision_base(dtype: torch.dtype) -> None:
    model = attach(build("llama", tied=True, dtype=dtype))
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    for rotation in ("none", "auto"):
        model = hard_model_in(dtype, rotation)
        assert logits(model).dtype == dtype
        assert {p.dtype for p in model.merge_and_unload().parameters()} == {dtype}


def hard_model_in(dtype: torch.dtype, rotation: str) -> PeftModel:
    model = attach(build("llama", tied=True, dtype=dtype), rotation=rotation)
    tuner = tuner_of(model)
    if tuner.needs_calibration():
        tuner.calibrate([batch(seed=3, batch_size=8)] * 2)
    tuner.set_step(1, 1)
    return model


# -- regularisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rank"), [("llama", 6), ("mixtral", "dense")])
def test_the_identity_loss_is_the_sum_over_every_operator(family: str, rank: Any) -> None:
    model = attach(build(family, tied=True), operator_rank=rank)
    tuner = tuner_of(model)
    stir(model)
    operators = tuner.operators()
    base = tuner.regularizers()["identity"].item()
    assert base == pytest.approx(sum(op.identity_loss().item() for op in operators.values()), rel=1e-6)
    for site, operator in operators.items():
        factors = [p for n, p in operator.named_parameters() if n != "scale"]
        assert len(factors) == (1 if rank == "dense" else 2)
        for factor in factors:
            saved = factor.detach().clone()
            with torch.no_grad():
                factor.mul_(1.1)
            assert tuner.regularizers()["identity"].item() > base + 1e-3, site
            with torch.no_grad():
                factor.copy_(saved)
    tuner.regularizers()["identity"].backward()
    for site, operator in operators.items():
        for name, parameter in operator.named_parameters():
            assert (parameter.grad is None) == (name == "scale"), site
            assert name == "scale" or parameter.grad.abs().max() > 1e-3, site


def test_the_active_loss_reaches_the_proxy_weights() -> None:
    model = attach(build("llama", tied=True), rotation="none")
    tuner = tuner_of(model)
    assert tuner.regularizers()["active"].item() == KEPT  # no channel is above zero yet
    tuner.regularizers()["active"].backward()
    assert torch.equal(tuner.mask().weight.grad.sign(), -torch.ones(48))


# -- the whole model's gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rotation", "step"), [("none", 7), ("pca", 0), ("pca", 19)])
def test_task_gradients_of_mask_and_operators_by_finite_differences(rotation: str, step: int) -> None:
    """float64 throughout, at the largest entry of every factor at both ends of the stream and in its middle."""
    model = attach(build("llama", tied=True), rotation=rotation).double().train()
    tuner = tuner_of(model)
    if rotation == "pca":
        tuner.calibrate([batch(seed=3, batch_size=8)] * 2)
    stir(model)
    with torch.no_grad():
        tuner.mask().weight.div_(40)  # w_M of size 0.1, where neither sigmoid nor temperature saturate
    tuner.set_step(step, 20)
    inputs = batch()

    def loss() -> torch.Tensor:
        with Float64():
            return model(**inputs, labels=inputs["input_ids"]).loss

    loss().backward()
    parameters = [tuner.mask().weight]
    for site in ("model.embed_tokens", "model.layers.1.self_attn.o_proj"):
        operator = tuner.operators()[site]
        parameters += [operator.down, operator.scale, operator.up]
    for parameter in parameters:
        gradient, flat = parameter.grad.flatten(), parameter.data.view(-1)
        index = int(gradient.abs().argmax())
        values = []
        for shift in (1e-7, -1e-7):
            flat[index] += shift
            values.append(loss().item())
            flat[index] -= shift
        numeric = (values[0] - values[1]) / 2e-7
        assert gradient[index].item() == pytest.approx(numeric, rel=1e-5), parameter.shape
        assert abs(numeric) > 1e-3


# -- the base, and switching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_second_adapter_leaves_the_first_as_it_was(family: str) -> None:
    """TRL's DPOTrainer adds one named "ref" to a ready PeftModel."""
    model = hard_model(family)
    tuner = tuner_of(model)
    with model.disable_adapter():
        base = logits(model)
    first, regularisers = logits(model), tuner.regularizers("default")
    add_adapter(model, "ref", rotation="none")
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), first)
    assert tuner.regularizers("default")["identity"].item() == regularisers["identity"].item()

    model.set_adapter("ref")
    assert torch.equal(logits(model), base)  # fresh, so the identity
    stir(model, "ref", seed=6)
    tuner.set_step(3, 3)
    second = logits(model)
    assert largest_difference(second, first) > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), base)

    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not torch.equal(tuner.mask("ref").keep, tuner.mask("default").keep)
    for name, adapter in (("default", first), ("ref", second)):
        dense = model.merge_and_unload(adapter_names=[name])
        assert largest_difference(logits(dense), adapter) < 1e-4

    model.delete_adapter("ref")
    assert torch.equal(logits(model), first)
    assert not any(".ref." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("first_untied", [True, False])
def test_two_adapters_of_a_tied_model_may_treat_its_ends_differently(first_untied: bool) -> None:
    model = hard_model("llama", rotation="none", untie_word_embeddings=first_untied)
    first = logits(model)
    add_adapter(model, "other", rotation="none", untie_word_embeddings=not first_untied)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    stir(model, "other", seed=6)
    tuner_of(model).set_step(1, 1)
    second = logits(model)
    for name, expected in (("default", first), ("other", second)):
        dense = model.merge_and_unload(adapter_names=[name])
        assert largest_difference(logits(dense), expected) < 1e-4
        assert dense.config.tie_word_embeddings != (first_untied == (name == "default"))


def test_unloading_gives_the_base_back_whatever_was_trained() -> None:
    base = build("llama", tied=False)
    before = copy.deepcopy(base.state_dict())
    model = attach(base, modules_to_save=["lm_head"])
    add_adapter(model, "other", modules_to_save=["model.norm"])
    for name in ("default", "other"):
        stir(model, name)
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_switching_moves_what_is_trainable() -> None:
    model = attach(build("llama", tied=True))
    add_adapter(model, "other")
    for active, idle in (("other", "default"), ("default", "other")):
        model.set_adapter(active)
        for name, parameter in model.named_parameters():
            if f".{active}." in name:
                assert parameter.requires_grad, name
            if f".{idle}." in name:
                assert not parameter.requires_grad, name


def test_deleting_the_active_adapter_switches_to_the_other() -> None:
    model = hard_model()
    add_adapter(model, "other", rotation="none")
    model.set_adapter("other")
    fresh = logits(model)
    model.set_adapter("default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model), fresh)


def test_several_active_adapters_are_refused_where_one_is_needed() -> None:
    model = hard_model()
    add_adapter(model, "other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(PatError, match="exactly one"):
        tuner_of(model).mask()


# -- copies ------------------------------------------------------------------------------------------------------------


def deep_copied(model: PeftModel) -> PeftModel:
    return copy.deepcopy(model)


def pickled(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("copied", "rotation", "tied"),
    [(deep_copied, "none", False), (deep_copied, "pca", True), (pickled, "none", True), (pickled, "pca", False)],
)
def test_a_copy_is_equal_and_independent(copied: Any, rotation: str, tied: bool) -> None:
    model = hard_model(tied=tied, rotation=rotation)
    expected = logits(model)
    other = copied(model)
    assert torch.equal(logits(other), expected)
    stir(other, seed=8)
    changed = logits(other)
    assert largest_difference(changed, expected) > 0.01
    assert torch.equal(logits(model), expected)
    stir(model, seed=9)
    assert torch.equal(logits(other), changed)
    assert largest_difference(logits(other.merge_and_unload()), changed) < 1e-4
    other.unload()
    assert largest_difference(logits(model), expected) > 0.01  # its hooks are still there


# -- merging and its refusals ------------------------------------------------------------------------------------------


@pytest.fixture
def soft() -> PeftModel:
    model = attach(build("llama", tied=True), rotation="none")
    tuner_of(model).set_step(3, 10)
    return model


def test_merging_before_the_milestone_is_refused(soft: PeftModel) -> None:
    with pytest.raises(PatError, match=r"step 3 .*milestone: step 10"):
        soft.merge_and_unload()
    with pytest.raises(PatError, match=r"never been trained.*PatCallback"):
        attach(build("llama", tied=True)).merge_and_unload()
    assert not tuner_of(soft).mask().hardened


def test_non_finite_weights_are_refused_on_request() -> None:
    model = hard_model(rotation="none")
    with torch.no_grad():
        tuner_of(model).operators()["model.layers.1.mlp.down_proj"].scale[0] = torch.inf
    with pytest.raises(PatError, match=r"non-finite.*layers\.1\.mlp\.down_proj"):
        model.merge_and_unload(safe_merge=True)


def test_generation_config_and_progress_bar() -> None:
    model = hard_model(rotation="none")
    model.base_model.model.generation_config.temperature = 0.321
    dense = model.merge_and_unload(progressbar=True)
    assert dense.generation_config.temperature == 0.321


# -- generation and compilation ----------------------------------------------------------------------------------------


@pytest.fixture(params=["gemma3_text", "mixtral"])
def hard(request: pytest.FixtureRequest) -> Iterator[PeftModel]:
    yield hard_model(request.param)


def test_masked_and_dense_model_generate_the_same(hard: PeftModel) -> None:
    prompt = batch(batch_size=1, length=6)
    options = {"max_new_tokens": 8, "do_sample": False}
    dense = hard.merge_and_unload()
    assert torch.equal(hard.generate(**prompt, **options), dense.generate(**prompt, **options))


def test_layers_are_where_peft_looks_for_them(hard: PeftModel) -> None:
    layers = [module for module in hard.modules() if isinstance(module, HsmLayer | MaskLayer)]
    assert len(layers) == 8
    assert all(layer.active_adapters == ["default"] for layer in layers)
    status = hard.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"]
