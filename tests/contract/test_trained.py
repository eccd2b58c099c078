"""The contract of every family: what was trained is what is saved, and the base stays what it was.

Each case is one short training with a stock `Trainer` (see `train_and_merge`), shared by all tests of this file.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, build
from tiny_training import Trained, largest_difference, logits, train_and_merge
from transformers import AutoModelForCausalLM

from pat.errors import PatError
from pat.families import get_family
from pat.surgery.rotation import equalised_gain, gain_block
from pat.tuner.layer import HsmLayer, MaskLayer

HIDDEN, KEPT = 48, 36

PARITY = 1e-4
"""Masked against dense, max |Δlogit| in float32 at logits of size one: the project's acceptance."""

SAME_FUNCTION = 1e-5
"""Two float32 evaluations of the same function whose products are ordered differently."""

ALIGNMENT = 1e-6
"""The same weights at another alignment in memory (a file's mapping has one of its own): some kernels, those of the
experts among them, then sum in another order. All other families agree to the last bit."""


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool
    dora: bool
    rotation: str

    def __str__(self) -> str:
        parts = ("tied" if self.tied else "untied", "dora" if self.dora else "lora", self.rotation)
        return "-".join((self.family, *parts))


CASES = [
    Case(family, tied, dora, rotation)
    for family in FAMILIES
    for tied in (True, False)
    for dora in (False, True)
    for rotation in ("none", "pca")
    if rotation == "none" or not get_family(family).has_post_norms
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def trained(case: Case) -> Iterator[Trained]:
    base = build(case.family, tied=case.tied)
    yield train_and_merge(base, use_dora=case.dora, rotation=case.rotation)


def test_masked_and_dense_model_are_the_same(trained: Trained, record_property: Callable[[str, object], None]) -> None:
    difference = largest_difference(trained.masked_logits, trained.dense_logits)
    record_property("max_logit_difference", difference)
    assert trained.dense_logits.std() > 0.3  # a difference of zero between two silent models would mean nothing
    assert difference <= PARITY


def test_everything_was_trained(trained: Trained, case: Case) -> None:
    """Otherwise the parity above would be that of an adapter that does nothing."""
    tuner = trained.tuner
    assert largest_difference(trained.masked_logits, trained.base_logits) > 0.5
    assert tuner.mask().weight.any()
    for site, operator in tuner.operators().items():
        assert operator.scale.any(), site
    lora = {n: p for n, p in trained.model.named_parameters() if "lora_B" in n}
    assert len(lora) >= 3 * 4
    assert all(parameter.any() for parameter in lora.values())
    assert any("magnitude" in n for n, _ in trained.model.named_parameters()) == case.dora


def test_a_fresh_adapter_changes_nothing(trained: Trained) -> None:
    """Not even the last bit: neither the operators nor, before its calibration, the mask."""
    assert torch.equal(trained.fresh_logits, trained.base_logits)


def test_the_start_of_training_is_the_base(trained: Trained, case: Case) -> None:
    if case.rotation == "none":
        assert torch.equal(trained.calibrated_logits, trained.base_logits)
    elif not case.tied:
        assert largest_difference(trained.calibrated_logits, trained.base_logits) <= PARITY
    else:  # the base with the final gain equalised in the rotated block
        family = get_family(case.family)
        equalised = build(case.family, tied=True)
        norm = equalised.get_submodule(family.final_norm)
        gain = norm.weight.detach() + family.gain_offset
        block = gain_block(gain, trained.tuner.peft_config["default"].gain_tolerance)
        assert 0 < int(block.sum()) < HIDDEN
        norm.weight.data.copy_(equalised_gain(gain, block) - family.gain_offset)
        assert largest_difference(trained.calibrated_logits, logits(equalised)) <= SAME_FUNCTION


def test_exactly_the_asked_for_channels_are_kept(trained: Trained) -> None:
    mask = trained.tuner.mask()
    assert mask.hardened and mask.milestone_step == 2 and mask.step == 2
    assert len(mask.keep_indices) == KEPT
    assert not mask.pinned[~mask.keep].any()
    assert trained.dense.config.hidden_size == KEPT


def test_the_dense_model_is_the_bases_class_and_smaller(trained: Trained, case: Case) -> None:
    base, dense = trained.tuner.model, trained.dense
    assert type(dense) is type(base)
    assert KEPT % dense.config.num_attention_heads == 0
    assert dense.config.head_dim == base.model.layers[0].self_attn.head_dim
    assert dense.config.num_attention_heads == base.config.num_attention_heads
    assert dense.config.rms_norm_eps == pytest.approx(base.config.rms_norm_eps * HIDDEN / KEPT, rel=1e-12)
    reference = build(case.family, tied=case.tied, hidden_size=KEPT, head_dim=dense.config.head_dim)
    assert dense.num_parameters() == reference.num_parameters()
    assert dense.num_parameters() < 0.8 * sum(
        t.numel() for n, t in trained.base_weights.items() if not (case.tied and n == "lm_head.weight")
    )


def test_tied_stays_tied(trained: Trained, case: Case) -> None:
    dense = trained.dense
    shared = dense.lm_head.weight is dense.model.embed_tokens.weight
    assert shared == case.tied == dense.config.tie_word_embeddings


def test_the_base_is_never_modified(trained: Trained) -> None:
    """With the adapter switched off, exactly the base's logits; after unload(), exactly the base's parameters."""
    with trained.model.disable_adapter():
        assert torch.equal(logits(trained.model), trained.base_logits)
    assert torch.equal(logits(trained.model), trained.masked_logits)

    unloaded = copy.deepcopy(trained.model).unload()
    state = unloaded.state_dict()
    assert state.keys() == trained.base_weights.keys()
    assert all(torch.equal(state[name], value) for name, value in trained.base_weights.items())
    assert not any(isinstance(module, HsmLayer | MaskLayer) for module in unloaded.modules())
    assert not any(module._forward_hooks for module in unloaded.modules())
    assert torch.equal(logits(unloaded), trained.base_logits)


def test_merging_leaves_the_masked_model_as_it_is(trained: Trained) -> None:
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    again = trained.model.merge_and_unload()
    after = trained.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(again), trained.dense_logits)


def test_the_dense_folder_opens_in_stock_transformers(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained.dense.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert not caplog.records
    assert type(loaded) is type(trained.dense)
    weights = trained.dense.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
    assert largest_difference(logits(loaded), trained.dense_logits) <= ALIGNMENT
    assert all(file.suffix != ".bin" for file in tmp_path.iterdir())


# -- where a rotation is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [f for f in FAMILIES if get_family(f).has_post_norms])
def test_post_norm_families_refuse_a_rotation_asked_for_by_name(family: str, tied: bool) -> None:
    with pytest.raises(PatError, match=r"rotation='pca'.*norms between its writers and the residual add"):
        train_and_merge(build(family, tied=tied), rotation="pca")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_automatic_choice(family: str, record_property: Callable[[str, object], None]) -> None:
    """PCA where it is exact; elsewhere no rotation, but the channels in the order of their measured importance."""
    trained = train_and_merge(build(family, tied=True), rotation="auto")
    mask = trained.tuner.mask()
    post_norms = get_family(family).has_post_norms
    assert trained.tuner.peft_config["default"].resolved_rotation == ("none" if post_norms else "pca")
    assert mask.calibrated
    assert (mask.basis is None) == post_norms
    assert int((mask.prior > 0).sum() + mask.pinned.sum()) == KEPT
    difference = largest_difference(trained.masked_logits, trained.dense_logits)
    record_property("max_logit_difference", difference)
    assert difference <= PARITY
