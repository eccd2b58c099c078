"""Cutting the space inside a branch, and counting what is left."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build, shallow

from pat.families import get_family
from pat.surgery.adapted import AdaptedMatrix
from pat.surgery.axes import InnerCut, cut_inner, prunable
from pat.surgery.dense import shrink_config
from pat.surgery.describe import head_dim, map_of
from pat.surgery.layers import example_layers

KEEP = torch.tensor([True, False, True, True, False])


def test_rows_are_taken_from_every_block() -> None:
    fused = torch.arange(10.0).unsqueeze(1) * torch.ones(1, 3)  # gate and up
    assert InnerCut(KEEP).rows(fused)[:, 0].tolist() == [0, 2, 3, 5, 7, 8]
    assert InnerCut(KEEP).rows(torch.arange(5.0)).tolist() == [0, 2, 3]


def test_columns_take_over_what_the_dropped_ones_did() -> None:
    weight, matrix = torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 3)
    a = torch.randn(5, 7, dtype=torch.float64)
    a[~KEEP] = matrix.double() @ a[KEEP]
    torch.testing.assert_close(InnerCut(KEEP, matrix).columns(weight) @ a[KEEP], weight @ a, atol=1e-12, rtol=0)
    assert torch.equal(InnerCut(KEEP).columns(weight), weight[:, KEEP])
    assert InnerCut(KEEP, matrix).columns(weight.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen2", "phi3", "arcee"])
def test_an_adapted_matrix_is_cut_like_what_it_stands_for(family: str) -> None:
    model = shallow(family, tied=False).double()
    stream, tensors = map_of(model), dict(model.named_parameters())
    writer = next(branch.writer.path for branch in stream.branches if branch.kind == "mlp")
    keep = torch.rand(72, generator=torch.Generator().manual_seed(0)) > 0.4
    cut = InnerCut(keep, torch.randn(int((~keep).sum()), int(keep.sum())))

    def adapted(name: str) -> AdaptedMatrix | torch.Tensor:
        weight = tensors[name].detach()
        if weight.dim() < 2:
            return weight
        generator = torch.Generator().manual_seed(len(name))
        shapes = (len(weight), 2), (2, weight.shape[1])
        up, down = (torch.randn(shape, generator=generator).double() for shape in shapes)
        return AdaptedMatrix(weight, up, down, 0.5)

    def multiplied_out(name: str) -> torch.Tensor:
        found = adapted(name)
        return found.merged() if isinstance(found, AdaptedMatrix) else found

    small, expected = (cut_inner(weight, stream, {writer: cut}) for weight in (adapted, multiplied_out))
    changed = 0
    for name, tensor in tensors.items():
        found = small(name)
        found = found.merged() if isinstance(found, AdaptedMatrix) else found
        torch.testing.assert_close(found, expected(name), atol=1e-12, rtol=1e-12)
        changed += found.shape != tensor.shape
    inner = next(branch for branch in stream.branches if branch.writer.path == writer)
    assert changed == 1 + sum(len(reader.names) for reader in inner.inner)


def test_rows_and_columns_of_a_group_go_together() -> None:
    keep = torch.tensor([False, True])  # of two groups of two queries, heads of three channels
    cut = InnerCut(keep, fused=(6, 3, 3))
    assert cut.rows(torch.arange(12)).tolist() == list(range(6, 12))  # queries
    assert cut.rows(torch.arange(6)).tolist() == [3, 4, 5]  # keys, values
    assert cut.rows(torch.arange(24)).tolist() == [*range(6, 12), 15, 16, 17, 21, 22, 23]  # all three, fused
    assert cut.rows(torch.arange(4)).tolist() == [2, 3]  # one number for each query head
    assert cut.columns(torch.arange(12.0).unsqueeze(0)).squeeze().tolist() == list(range(6, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_the_cut_model_has_them(family: str) -> None:
    model = build(family, tied=False)
    base = prunable(model)
    pruned = {"hidden_size": 36, "intermediate_size": 50, "num_key_value_heads": 1, "num_hidden_layers": 2}
    obstacles = {"mlp": "intermediate_size", "heads": "num_key_value_heads"}
    for axis in base.obstacles:
        pruned[obstacles[axis]] = base.sizes.get(obstacles[axis], 0)
    layers = example_layers(map_of(model), 2)
    sizes = {name: size for name, size in pruned.items() if name in base.sizes}
    config = shrink_config(
        model.config, get_family(family), sizes, head_dim=head_dim(model), tied=False, keep_layers=layers
    )
    assert base.count(sizes) == type(model)(config).num_parameters()
    assert base.count(base.sizes) == model.num_parameters()
    spans = model.model.layers[0].self_attn.__dict__["_modules"].get("q_norm")
    assert ("heads" in base.obstacles) == (spans is not None and len(spans.weight) != head_dim(model))
