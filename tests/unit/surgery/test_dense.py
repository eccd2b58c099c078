"""The small model: its configuration, and that wrong weights cannot slip in as random ones."""

import copy

import pytest
import torch
from tiny_models import KINDS, build
from torch import Tensor

from pat.errors import PatError, RunFailed
from pat.families import get_family
from pat.surgery.dense import build_dense, shrink_config
from pat.surgery.rope import legacy_rope


@pytest.mark.parametrize("family", KINDS)
def test_shrunk_config(family: str) -> None:
    base = build(family, tied=True)
    before = copy.deepcopy(base.config.to_dict())
    head_dim = base.model.layers[0].self_attn.head_dim
    small = shrink_config(base.config, get_family(family), {"hidden_size": 36}, head_dim=head_dim, tied=False)
    assert base.config.to_dict() == before
    assert small.hidden_size == 36
    assert small.head_dim == head_dim
    assert small.rms_norm_eps == pytest.approx(base.config.rms_norm_eps * 48 / 36, rel=1e-15)
    assert small.tie_word_embeddings is False
    changed = {key for key, value in small.to_dict().items() if before.get(key) != value}
    in_older_words = legacy_rope(small).keys()  # for transformers 4
    assert changed <= {"hidden_size", "rms_norm_eps", "head_dim", "tie_word_embeddings", *in_older_words}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_a_width_that_transformers_refuses_is_named_before_any_work(family: str) -> None:
    config = build(family, tied=True).config
    with pytest.raises(
        PatError, match=rf"transformers refuses a {family} model of hidden size 37 with 4 attention heads"
    ):
        shrink_config(config, get_family(family), {"hidden_size": 37}, head_dim=20, tied=True)


def test_what_is_no_part_of_the_model_leaves_no_trace_in_the_config() -> None:
    config = build("llama", tied=True).config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.auto_map, config.custom_pipelines = {"AutoConfig": "configuration_x.XConfig"}, {"x": {}}
    config._attn_implementation = "eager"  # which alone can, and is not what the small model is built with
    config.output_attentions = True
    small = shrink_config(config, get_family("llama"), {"hidden_size": 36}, head_dim=20, tied=True)
    assert not {"quantization_config", "auto_map", "custom_pipelines"} & vars(small).keys()
    assert not small.output_attentions


def small_llama(**changes: Tensor | None) -> tuple:
    base = build("llama", tied=False)
    config = shrink_config(base.config, get_family("llama"), {"hidden_size": 36}, head_dim=20, tied=False)
    source = build("llama", tied=False, hidden_size=36, head_dim=20, seed=1)
    weights = {name: p.detach().clone() for name, p in source.named_parameters()}
    for name, value in changes.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return base, config, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_small_model_holds_the_given_weights_in_the_bases_class(dtype: torch.dtype) -> None:
    base, config, weights = small_llama()
    base.generation_config.temperature = 0.123
    model = build_dense(base, config, weights, dtype)
    assert type(model) is type(base)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].to(dtype)) and parameter.dtype == dtype
    assert model.generation_config.temperature == 0.123
    assert model.generation_config is not base.generation_config
    assert not model.training


@pytest.mark.parametrize(
    "changes",
    [
        {"model.norm.weight": None},
        {"model.layers.7.mlp.up_proj.weight": torch.zeros(72, 36)},
        {"model.norm.weight": torch.zeros(48)},
    ],
    ids=["missing", "left over", "wrong shape"],
)
def test_weights_that_do_not_fit_are_an_error(changes: dict[str, Tensor | None]) -> None:
    base, config, weights = small_llama(**changes)
    with pytest.raises(RunFailed):
        build_dense(base, config, weights, torch.float32)
