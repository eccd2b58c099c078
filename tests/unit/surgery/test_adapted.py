"""W + B A piece by piece is W + B A."""

from __future__ import annotations

import pytest
import torch

from pat.surgery.adapted import AdaptedMatrix

ROWS, COLUMNS, RANK = 14, 10, 3


def adapted(dtype: torch.dtype, fine: torch.dtype) -> tuple[AdaptedMatrix, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, up, down = (
        torch.randn(*shape, generator=generator) for shape in ((ROWS, COLUMNS), (ROWS, RANK), (RANK, COLUMNS))
    )
    matrix = AdaptedMatrix(weight.to(dtype), up.to(fine), down.to(fine), scaling=0.3)
    product = torch.einsum("nr,rm->nm", up.to(fine).double(), down.to(fine).double())
    return matrix, matrix.weight.double() + 0.3 * product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("selected", [False, True])
def test_rows(dtype: torch.dtype, transposed: bool, selected: bool) -> None:
    matrix, expected = adapted(dtype, torch.float32)
    stored, before = matrix.weight, matrix.weight.clone()
    if transposed:
        matrix, expected = matrix.mT, expected.mT
    keep = torch.tensor([0, 2, 3, 7])

    def select(rows: torch.Tensor) -> torch.Tensor:
        return rows.index_select(-1, keep)

    matrix = matrix.to(torch.float64)
    matrix = matrix.columns(select) if selected else matrix
    expected = expected[:, keep] if selected else expected
    num_rows = matrix.shape[0]
    pieces = [matrix.rows(start, start + 4) for start in range(0, num_rows, 4)]
    assert all(piece.dtype == torch.float64 for piece in pieces)
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(stored, before)  # never in place


@pytest.mark.parametrize(("dtype", "fine", "result"), [
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
])  # fmt: skip
def test_all_of_it(dtype: torch.dtype, fine: torch.dtype, result: torch.dtype) -> None:
    matrix, expected = adapted(dtype, fine)
    before = matrix.weight.clone()
    assert matrix.merged().dtype == result
    torch.testing.assert_close(matrix.merged().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix.weight, before)
