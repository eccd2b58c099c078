"""The family records against what the tiny models of transformers themselves show."""

import pytest
import torch
from tiny_models import FAMILIES as TINY
from tiny_models import ONE_PLUS_FAMILIES, build
from torch import nn

from pat.errors import PatError
from pat.families import FAMILIES, get_family


def test_every_family_of_the_test_models_has_a_record_and_the_other_way_round() -> None:
    assert set(FAMILIES) == set(TINY)


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param, tied=False)


def test_gain_offset(model: nn.Module) -> None:
    """Constant input 1 has RMS 1, so a norm's output is its gain."""
    record = get_family(model.config.model_type)
    norm = model.get_submodule(record.final_norm)
    gain = norm(torch.ones(1, 48)) * (1 + model.config.rms_norm_eps) ** 0.5
    torch.testing.assert_close(gain[0], norm.weight + record.gain_offset, atol=1e-5, rtol=0)
    assert (record.gain_offset == 1) == (record.model_type in ONE_PLUS_FAMILIES)


def test_scaled_embedding(model: nn.Module) -> None:
    record = get_family(model.config.model_type)
    embedding = model.get_submodule(record.embedding)
    row = embedding(torch.tensor([7]))[0] / embedding.weight[7]
    expected = 48**0.5 if record.scaled_embedding else 1.0
    torch.testing.assert_close(row, torch.full((48,), expected), atol=1e-4, rtol=0)


def test_norms_in_the_attention_are_the_records_qk_norms(model: nn.Module) -> None:
    record = get_family(model.config.model_type)
    layer = model.get_submodule(record.layers)[0]
    inside = {name for name, _ in layer.named_modules() if name.startswith("self_attn.") and name.endswith("norm")}
    assert inside == set(record.qk_norm)
    for projection in record.qk_projections if record.qk_norm else ():
        assert isinstance(layer.get_submodule(projection), nn.Linear)


def test_norms_beside_the_attention_are_pre_or_post_norms_of_the_record(model: nn.Module) -> None:
    record = get_family(model.config.model_type)
    layer = model.get_submodule(record.layers)[0]
    beside = {name for name, _ in layer.named_children() if name.endswith("norm")}
    named = {n for b in (record.attention, *record.feed_forward) for n in (b.pre_norm, b.post_norm) if n}
    assert beside == named


@pytest.mark.parametrize("kind", ["attention", "feed_forward"])
def test_order_of_norm_readers_writer_and_post_norm(model: nn.Module, kind: str) -> None:
    """A gain on the wrong side of a writer would be folded into the wrong weights."""
    record = get_family(model.config.model_type)
    layer = model.get_submodule(record.layers)[0]
    called: list[str] = []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: called.append(name))
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    alternatives = (record.attention,) if kind == "attention" else record.feed_forward
    branch = next(b for b in alternatives if b.hook_site in called)
    order = [called.index(branch.hook_site)]
    if branch.pre_norm:
        order.insert(0, called.index(branch.pre_norm))
    for reader in branch.readers:
        if reader in called:  # a bare parameter of experts is no module
            assert order[0] <= called.index(reader) < order[-1] or not branch.pre_norm
            assert called.index(reader) < called.index(branch.hook_site)
    if branch.post_norm:
        order.append(called.index(branch.post_norm))
    assert order == sorted(order)


def test_an_unknown_family_lists_the_supported_ones_and_says_what_a_record_needs() -> None:
    with pytest.raises(PatError) as error:
        get_family("gpt2")
    message = str(error.value)
    assert "'gpt2'" in message and "families.py" in message and "RMSNorm" in message
    for name in TINY:
        assert name in message


def test_only_families_with_post_norms_rule_out_a_rotation() -> None:
    assert {name for name, record in FAMILIES.items() if record.has_post_norms} == {"gemma2", "gemma3_text", "olmo2"}
