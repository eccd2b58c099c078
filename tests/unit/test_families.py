"""The family records against what the tiny models of transformers themselves show."""

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES as TINY
from tiny_models import build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pat.errors import PatError
from pat.families import FAMILIES, REFUSED, get_family

LIST = Path(__file__).parents[2] / "docs" / "models.md"


def test_every_record_has_a_test_model_and_the_other_way_round() -> None:
    assert set(FAMILIES) == set(TINY)


def test_the_list_of_models_is_that_of_the_records_and_nothing_else() -> None:
    section = LIST.read_text().partition("## Supported models")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip(" `") for row in rows) == sorted(FAMILIES)
    assert all(row[1].strip() for row in rows)


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param, tied=False, num_hidden_layers=2)


def test_gain_offset(model: nn.Module) -> None:
    """Constant input 1 has RMS 1, so a norm's output is its gain."""
    record = get_family(model.config.model_type)
    norm = model.get_submodule(record.final_norm)
    gain = norm(torch.ones(1, 48)) * (1 + model.config.rms_norm_eps) ** 0.5
    torch.testing.assert_close(gain[0], norm.weight + record.gain_offset, atol=1e-5, rtol=0)


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
    for norm in record.qk_norm:  # they share the config's epsilon, which a bystander must not
        module = layer.get_submodule(norm)
        assert getattr(module, "eps", getattr(module, "variance_epsilon", None)) == model.config.rms_norm_eps
    for projection in record.qk_projections if record.qk_norm else ():
        assert isinstance(layer.get_submodule(projection), nn.Linear)


def test_norms_beside_the_attention_are_pre_or_post_norms_of_the_record(model: nn.Module) -> None:
    record = get_family(model.config.model_type)
    layer = model.get_submodule(record.layers)[0]
    beside = {name for name, _ in layer.named_children() if "norm" in name}
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


def test_bystanders_are_there_and_matter(model: nn.Module) -> None:
    """A constant that is forgotten in the small model would show."""
    record = get_family(model.config.model_type)
    layer = model.get_submodule(record.layers)[0]
    state = layer.state_dict(keep_vars=True)
    tokens = torch.arange(4, 28).unsqueeze(0)
    with torch.no_grad():
        before = model(tokens).logits
        for name in record.bystanders:
            kept = state[name].clone()
            state[name].mul_(1.5).add_(0.2)
            assert (model(tokens).logits - before).abs().max() > 1e-4, name
            state[name].copy_(kept)


def test_an_unknown_family_lists_the_supported_ones_and_says_what_a_record_needs() -> None:
    with pytest.raises(PatError) as error:
        get_family("nanochat")
    message = str(error.value)
    assert "'nanochat'" in message and "families.py" in message and "RMSNorm" in message
    for name in TINY:
        assert name in message


def tiny(model_type: str, **fields: object) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    if model_type == "gpt_neo":
        sizes["attention_types"] = [[["global"], 2]]
    config = AutoConfig.for_model(model_type, **(sizes | fields))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_refused_is_as_the_reason_says(model_type: str) -> None:
    with pytest.raises(PatError, match=f"'{model_type}'.*not supported: .*supported: apertus, "):
        get_family(model_type)
    if "LayerNorm" in REFUSED[model_type]:
        assert any("LayerNorm" in type(module).__name__ for module in tiny(model_type).modules())
        return
    head_dim = 12
    attention = tiny(model_type, hidden_size=36, head_dim=head_dim).model.layers[0].self_attn
    assert attention.q_proj.out_features == 4 * head_dim
    width = attention.q_norm.weight.numel() if "q_norm" in REFUSED[model_type] else attention.o_proj.in_features
    assert width == 36
