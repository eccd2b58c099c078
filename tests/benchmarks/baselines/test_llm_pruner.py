"""LLM-Pruner: the identity at ratio 0, groups that really are coupled, and the importance against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from compare.baselines.budget import num_parameters
from compare.baselines.llm_pruner import Shape, _cut, layer_importance, llm_pruner, loadable_shapes, taylor_terms
from compare.baselines.llm_pruner_published import llm_pruner_published
from tiny_models import batch, build
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from pat.errors import PatError
from pat.families import get_family

CUTTABLE = ("llama", "qwen2", "qwen3", "gemma3_text", "granite")

DIFFERENCE = 1e-2
"""Relative, of sums of finite differences: the norms of transformers compute in float32, so steps cannot be small."""


def sequences(num: int = 3, length: int = 12) -> list[Tensor]:
    return list(batch(seed=5, batch_size=num + 1, length=length)["input_ids"][:num])


def loss(model: PreTrainedModel, calibration: list[Tensor]) -> float:
    """Mean next-token loss; in float64, which transformers' own is not."""
    ids = torch.stack(calibration)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double()
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CUTTABLE)
def test_cutting_nothing_gives_exactly_the_base(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    pruned, shape = llm_pruner(model, sequences(), target_parameters=num_parameters(model))
    assert type(pruned) is type(model)
    assert shape.intermediate_size == model.config.intermediate_size
    assert torch.equal(pruned(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("family", CUTTABLE)
def test_the_result_is_a_stock_model_of_the_size_asked_for(family: str, tmp_path: str) -> None:
    model = build(family, tied=True)
    target = round(0.75 * num_parameters(model))
    pruned, shape = llm_pruner(model, sequences(), target_parameters=target)
    channel_of_all_layers = 3 * (3 * model.config.hidden_size + 2)  # 2: biases of gate and up
    assert abs(num_parameters(pruned) - target) <= channel_of_all_layers / 2
    assert pruned.config.num_attention_heads == shape.num_attention_heads
    assert pruned.config.intermediate_size == shape.intermediate_size
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch()).logits, pruned(**batch()).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("shape", [Shape(1, 2, 50), Shape(2, 1, 72), Shape(1, 1, 7)])
def test_cutting_groups_equals_zeroing_them(family: str, shape: Shape) -> None:
    model = build(family, tied=False)
    importance = layer_importance(model, sequences())
    reference = build(family, tied=False)
    per_head = reference.model.layers[0].self_attn.head_dim
    num_groups = reference.config.num_key_value_heads
    per_group = reference.config.num_attention_heads // num_groups
    with torch.no_grad():
        for layer, scores in zip(reference.model.layers, importance, strict=True):
            best = scores.queries.sort(1, descending=True)
            value = scores.keys_values + best.values[:, : shape.queries_per_group].sum(1)
            groups = set(value.topk(shape.num_key_value_heads).indices.tolist())
            for group in range(num_groups):
                for query in range(per_group):
                    if group in groups and query in best.indices[group, : shape.queries_per_group]:
                        continue
                    start = (group * per_group + query) * per_head
                    layer.self_attn.o_proj.weight[:, start : start + per_head] = 0
            cut = scores.channels.argsort(descending=True)[shape.intermediate_size :]
            layer.mlp.down_proj.weight[:, cut] = 0
    pruned = build(
        family,
        tied=False,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        head_dim=per_head,
    )
    pruned.load_state_dict(dict(_cut(model, get_family(family), importance, shape)))
    assert (pruned(**batch()).logits - reference(**batch()).logits).abs().max() < 1e-5


def test_terms_are_the_slope_of_the_loss_when_a_group_is_scaled_down() -> None:
    model, calibration, step = build("llama", tied=False).double(), sequences(6), 1e-2
    names = ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.bias")
    term = taylor_terms(model, calibration, names)
    for name in names:
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept * (1 - step))
            down = loss(model, calibration)
            parameter.copy_(kept * (1 + step))
            up = loss(model, calibration)
            parameter.copy_(kept)
        assert (up - down) / (2 * step) == pytest.approx(term(name).sum().item(), rel=DIFFERENCE)


def test_importance_is_the_sum_of_single_parameters_effects() -> None:
    model = build("llama", tied=False, hidden_size=16, head_dim=4, intermediate_size=6, num_hidden_layers=1).double()
    calibration, step = sequences(2, 8), 0.05
    importance = layer_importance(model, calibration)[0]

    def effect(name: str, *index: int) -> float:
        parameter = model.get_parameter(f"model.layers.0.{name}")
        kept = parameter[index].item()
        with torch.no_grad():
            parameter[index] = kept * (1 + step)
            up = loss(model, calibration)
            parameter[index] = kept * (1 - step)
            down = loss(model, calibration)
            parameter[index] = kept
        return abs(up - down) / (2 * step)

    channel, width = 4, 16
    of_channel = [effect(f"mlp.{name}.weight", channel, j) for name in ("gate_proj", "up_proj") for j in range(width)]
    of_channel += [effect(f"mlp.{name}.bias", channel) for name in ("gate_proj", "up_proj")]
    of_channel += [effect("mlp.down_proj.weight", i, channel) for i in range(width)]
    assert importance.channels[channel].item() == pytest.approx(math.fsum(of_channel), rel=DIFFERENCE)

    group, query = 1, 0  # of two groups of two query heads each
    rows = range(4 * (2 * group + query), 4 * (2 * group + query) + 4)
    of_query = [effect("self_attn.q_proj.weight", i, j) for i in rows for j in range(width)]
    of_query += [effect("self_attn.q_proj.bias", i) for i in rows]
    of_query += [effect("self_attn.o_proj.weight", j, i) for i in rows for j in range(width)]
    assert importance.queries[group, query].item() == pytest.approx(math.fsum(of_query), rel=DIFFERENCE)

    both = [(f"self_attn.{name}", i) for name in ("k_proj", "v_proj") for i in range(4 * group, 4 * group + 4)]
    of_group = [effect(f"{name}.weight", i, j) for name, i in both for j in range(width)]
    of_group += [effect(f"{name}.bias", i) for name, i in both]
    assert importance.keys_values[group].item() == pytest.approx(math.fsum(of_group), rel=DIFFERENCE)


def test_only_loadable_head_counts_are_considered() -> None:
    # transformers wants hidden_size to be a multiple of the heads: of 12 heads, 48 channels allow 6, 4, 3, ... not 9.
    model = build("llama", tied=False, num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    seen = {
        (shape.num_key_value_heads, shape.queries_per_group)
        for share in (0.9, 0.75, 0.6, 0.4)
        for shape in loadable_shapes(model, round(share * num_parameters(model)))
    }
    assert seen == {(groups, queries) for groups in (1, 2, 3, 4) for queries in (1, 2, 3)} - {(3, 3)}
    # A single key/value head with a single query head leaves the channels alone to pay.
    model = build("llama", tied=False, num_attention_heads=1, num_key_value_heads=1)
    (shape,) = loadable_shapes(model, round(0.8 * num_parameters(model)))
    assert shape.num_attention_heads == 1 and shape.intermediate_size < model.config.intermediate_size
    # What cannot be met is approached.
    (shape,) = loadable_shapes(model, 1)
    assert shape == Shape(1, 1, 1)


def test_of_the_loadable_head_counts_the_calibration_text_decides() -> None:
    model, calibration = build("llama", tied=False), sequences(6)
    target = round(0.75 * num_parameters(model))
    shapes = loadable_shapes(model, target)
    losses = {}
    for shape in shapes:
        pruned = build(
            "llama",
            tied=False,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            intermediate_size=shape.intermediate_size,
        )
        pruned.load_state_dict(dict(_cut(model, get_family("llama"), layer_importance(model, calibration), shape)))
        losses[shape] = loss(pruned, calibration)
    pruned, chosen = llm_pruner(model, calibration, target_parameters=target)
    assert len(shapes) > 2 and chosen == min(losses, key=losses.__getitem__)
    assert loss(pruned, calibration) == losses[chosen]


@pytest.mark.parametrize("family", ["phi3", "olmo2", "mixtral"])
def test_other_layouts_are_refused(family: str) -> None:
    with pytest.raises(PatError, match=f"{family}.*separate q/k/v/o"):
        llm_pruner(build(family, tied=False), sequences(), target_parameters=1000)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_as_published_the_layers_between_lose_heads_and_channels_by_one_ratio(family: str) -> None:
    model, reference = (build(family, tied=True, num_hidden_layers=8) for _ in range(2))
    target = round(0.85 * num_parameters(model))
    pruned, shape = llm_pruner_published(model, sequences(), target_parameters=target)
    # 1 of 2 groups goes from half the channels on, which the two layers that are cut need to come near the target.
    assert shape.num_key_value_heads == 1 and shape.intermediate_size <= model.config.intermediate_size / 2
    channel = 2 * (3 * model.config.hidden_size + 2)  # 2: biases of gate and up
    assert abs(num_parameters(pruned) - target) <= channel / 2
    width = shape.queries_per_group * reference.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        for index, scores in enumerate(layer_importance(model, sequences())):
            if index in (4, 5):
                goes = int((scores.keys_values + scores.queries.sum(1)).argmin())
                output = reference.model.layers[index].self_attn.o_proj.weight
                output[:, goes * width : (goes + 1) * width] = 0
                cut = scores.channels.argsort(descending=True)[shape.intermediate_size :]
                reference.model.layers[index].mlp.down_proj.weight[:, cut] = 0
    assert (pruned(**batch()).logits - reference(**batch()).logits).abs().max() < 1e-5
    with pytest.raises(PatError, match="of 6 layers"):
        llm_pruner_published(build(family, tied=True, num_hidden_layers=6), sequences(), target_parameters=target)
