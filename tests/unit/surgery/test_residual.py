"""The map of a residual stream: every parameter has a role, none is guessed."""

import pytest
from tiny_models import KINDS, build

from pat.errors import PatError
from pat.families import get_family
from pat.surgery.residual import Linear, ResidualStream, map_residual_stream, model_tensors

LAYERS = 3


def parameter_names(family: str, *, tied: bool) -> list[str]:
    return list(model_tensors(build(family, tied=tied)))


def mapped(family: str, *, tied: bool) -> ResidualStream:
    return map_residual_stream(get_family(family), parameter_names(family, tied=tied), tied=tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_every_parameter_is_accounted_for_exactly_once(family: str, tied: bool) -> None:
    stream, names = mapped(family, tied=tied), parameter_names(family, tied=tied)
    accounted = [f"{stream.embedding}.weight", f"{stream.final_norm}.weight", *stream.untouched]
    accounted += stream.head.names if stream.head else ()
    for branch in stream.branches:
        accounted += branch.writer.names
        for reader in branch.readers:
            accounted += reader.names
        accounted += [f"{norm}.weight" for norm in (branch.pre_norm, branch.post_norm) if norm]
    assert sorted(accounted) == sorted(names)
    assert stream.num_tensors == len(names)
    assert (stream.head is None) == tied


@pytest.mark.parametrize("family", KINDS)
def test_one_site_for_the_embedding_and_two_a_layer(family: str) -> None:
    stream = mapped(family, tied=False)
    assert len(stream.sites) == len(set(stream.sites)) == 1 + 2 * LAYERS
    assert stream.sites[0] == "model.embed_tokens"


def test_experts_are_bare_parameters_and_the_site_is_the_block() -> None:
    branch = mapped("mixtral", tied=False).branches[1]
    assert branch.site == "model.layers.0.mlp"
    experts = "model.layers.0.mlp.experts"
    assert branch.writer == Linear(f"{experts}.down_proj", f"{experts}.down_proj", None)
    assert [reader.path for reader in branch.readers] == ["model.layers.0.mlp.gate", f"{experts}.gate_up_proj"]


def test_a_layer_without_experts_among_layers_with_experts() -> None:
    stream = mapped("qwen3_moe", tied=False)
    assert [branch.site for branch in stream.branches[1::2]] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp",
    ]


@pytest.mark.parametrize("family", KINDS)
def test_only_families_with_qk_norms_scale_their_query_and_key(family: str) -> None:
    scaled = mapped(family, tied=False).scaled_projections()
    if family not in ("llama", "phi3"):
        layers = (f"model.layers.{i}.self_attn" for i in range(LAYERS))
        assert scaled == {f"{layer}.{p}" for layer in layers for p in ("q_proj", "k_proj")}
    else:
        assert not scaled


def test_a_parameter_without_a_role_is_an_error() -> None:
    names = [*parameter_names("llama", tied=True), "model.layers.1.self_attn.sinks"]
    with pytest.raises(PatError, match=r"1 tensor\(s\).*sinks.*families\.py"):
        map_residual_stream(get_family("llama"), names, tied=True)


def test_a_missing_parameter_is_an_error() -> None:
    names = [name for name in parameter_names("llama", tied=True) if "layers.2.self_attn.o_proj" not in name]
    with pytest.raises(PatError, match=r"layers\.2\.self_attn\.o_proj"):
        map_residual_stream(get_family("llama"), names, tied=True)


def test_a_missing_norm_is_an_error() -> None:
    names = [name for name in parameter_names("llama", tied=True) if "layers.2.input_layernorm" not in name]
    with pytest.raises(PatError, match=r"no tensor model\.layers\.2\.input_layernorm\.weight"):
        map_residual_stream(get_family("llama"), names, tied=True)


def test_bystanders_are_untouched_buffers_included_and_a_layer_may_lack_them() -> None:
    names = [name for name in parameter_names("apertus", tied=True) if "1.mlp.act_fn.eps" not in name]
    untouched = map_residual_stream(get_family("apertus"), names, tied=True).untouched
    constants = {name.removeprefix("model.layers.") for name in untouched if "act_fn" in name}
    expected = {f"{i}.mlp.act_fn.{name}" for i in range(LAYERS) for name in ("alpha_p", "alpha_n", "beta", "eps")}
    assert constants == expected - {"1.mlp.act_fn.eps"}


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(PatError, match="no parameter under"):
        map_residual_stream(get_family("llama"), ["transformer.wte.weight"], tied=True)


def test_a_layer_without_a_known_feed_forward_is_an_error() -> None:
    names = [name for name in parameter_names("llama", tied=True) if "layers.1.mlp.down_proj" not in name]
    with pytest.raises(PatError, match="Layer 1 has no feed-forward writer"):
        map_residual_stream(get_family("llama"), names, tied=True)


def test_a_shared_head_may_be_listed_or_not() -> None:
    names = parameter_names("llama", tied=True)
    with_head = map_residual_stream(get_family("llama"), [*names, "lm_head.weight"], tied=True)
    assert with_head == map_residual_stream(get_family("llama"), names, tied=True)


def test_untie_gives_the_stream_a_head_of_its_own() -> None:
    stream = mapped("llama", tied=True)
    untied = stream.untie()
    assert stream.head is None and untied.head == Linear("lm_head", "lm_head.weight", None)
    assert untied.num_tensors == stream.num_tensors + 1
