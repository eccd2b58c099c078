"""Whole layers: which may go, what the others are then called, and what a configuration says of them."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import FAMILIES, build

from pat.surgery.describe import map_of
from pat.surgery.layers import LayerCut, cut_layer_fields, droppable_layers, example_layers, layers_of

CUT = LayerCut("model.layers", (0, 2, 11), 12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.2.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ("model.layers.11.mlp", "model.layers.2.mlp"),
        ("model.layers.0", "model.layers.0"),
        ("model.layers.1.mlp.down_proj.weight", None),
        ("model.norm.weight", "model.norm.weight"),
        ("other.model.layers.1", "other.model.layers.1"),
    ],
)
def test_what_stays_is_numbered_anew(name: str, expected: str | None) -> None:
    assert CUT.renamed(name) == expected


def test_parts_of_names_that_users_give_follow() -> None:
    given = ["norm", "layers.2.mlp.up_proj", "model.layers.0.mlp", "layers.1.mlp.up_proj"]
    assert CUT.renamed_parts(given) == ["norm", "model.layers.1.mlp.up_proj", "model.layers.0.mlp"]
    assert CUT.renamed_parts(None) is None
    assert not LayerCut("model.layers", (0, 1), 2).cuts and CUT.cuts


@pytest.mark.parametrize("family", FAMILIES)
def test_only_layers_of_the_most_frequent_kind_may_go(family: str) -> None:
    model = build(family, tied=False)
    stream = map_of(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    droppable = droppable_layers(stream)
    assert len({size for size, may_go in zip(sizes, droppable, strict=True) if may_go}) == 1
    assert sum(droppable) >= 2 and all(
        may_go or size != sizes[0] for size, may_go in zip(sizes, droppable, strict=True)
    )
    kept = example_layers(stream, 2)
    assert len(kept) == 2 and {0, 1, 2} - set(kept) == {max(i for i in range(3) if droppable[i])}
    cut = LayerCut(stream.family.layers, kept, 3).stream(stream)
    assert len(layers_of(cut)) == 2 and cut.num_tensors < stream.num_tensors


def fields(family: str, keep: tuple[int, ...], **more: Any) -> Any:
    config = build(family, tied=False, **more).config
    cut_layer_fields(config, keep)
    assert config.num_hidden_layers == len(keep)
    return config


def test_what_a_configuration_lists_by_layer_is_cut_along() -> None:
    assert fields("gemma2", (0, 2)).layer_types == ["sliding_attention"] * 2
    assert fields("smollm3", (1, 2)).no_rope_layers == [0, 1]
    assert fields("granite_swa", (1, 2)).layer_rope_theta == [0, 1_000.0]
    assert fields("mellum", (1, 2)).mlp_layer_types == ["dense", "sparse"]


def test_numbers_of_layers_in_a_configuration_follow() -> None:
    assert fields("qwen3_moe", (1, 2)).mlp_only_layers == [0]
    assert fields("qwen3_moe", (0, 2)).mlp_only_layers == []
    stepped = fields("qwen3_moe", (1, 2), mlp_only_layers=[], decoder_sparse_step=2)  # experts in the second one alone
    assert (stepped.mlp_only_layers, stepped.decoder_sparse_step) == ([1], 1)
    assert fields("qwen2", (0, 2), max_window_layers=2).max_window_layers == 1
