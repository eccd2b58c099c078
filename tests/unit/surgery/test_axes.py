"""Cutting the space inside a branch, and counting what is left."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, shallow

from pat.families import get_family
from pat.surgery.adapted import AdaptedMatrix
from pat.surgery.axes import InnerCut, count_parameters_at, cut_inner
from pat.surgery.dense import shrink_config
from pat.surgery.describe import head_dim, map_of

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


@pytest.mark.parametrize("family", [family for family in FAMILIES if not get_family(family).expert_parameters])
def test_parameters_are_counted_as_the_cut_model_has_them(family: str) -> None:
    model = shallow(family, tied=False)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    config = shrink_config(
        model.config,
        get_family(family),
        pruned_hidden_size=36,
        head_dim=head_dim(model),
        tied=False,
        pruned_intermediate_size=50,
    )
    expected = type(model)(config).num_parameters()
    assert count_parameters_at(map_of(model), shapes, hidden_share=36 / 48, mlp_share=50 / 72) == expected
    assert count_parameters_at(map_of(model), shapes) == model.num_parameters()
