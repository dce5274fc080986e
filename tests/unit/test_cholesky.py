"""The Cholesky factor that levels and layers share, and its inverse, each in the memory of one matrix."""

import pytest
import torch
from torch import Tensor

from evopress.compression.cholesky import _cholesky_in_place, damped_cholesky, forward, invert_unit_lower


def hessian(columns: int) -> Tensor:
    inputs = torch.randn(columns // 2 + 1, columns, generator=torch.Generator().manual_seed(columns))
    return inputs.T @ inputs


@pytest.mark.parametrize("columns", [1, 5, 600])
def test_the_factor_times_its_transpose_is_the_damped_hessian(columns: int) -> None:
    given = hessian(columns)
    before = given.clone()
    factor = damped_cholesky(given, 0.01)
    upper = factor.reversed_unit.flip(0, 1) * factor.pivots
    assert torch.equal(upper, upper.triu())
    assert factor.shift == pytest.approx(0.01 * float(given.diagonal().double().mean()))
    damped = given.double() + factor.shift * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(upper @ upper.T, damped, rtol=1e-10, atol=1e-8)
    assert torch.equal(given, before)


@pytest.mark.parametrize("columns", [1, 512, 513, 1100])
def test_inverse_and_order_panel_by_panel(columns: int) -> None:
    factor = damped_cholesky(hessian(columns), 0.1).reversed_unit
    inverse = factor.clone()
    invert_unit_lower(inverse)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ factor, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(forward(inverse), inverse.flip(0, 1).float())


def test_the_factor_takes_the_place_of_the_matrix() -> None:
    matrix = hessian(40).double() + torch.eye(40)
    expected, place = torch.linalg.cholesky(matrix), matrix.data_ptr()
    assert _cholesky_in_place(matrix)
    assert matrix.data_ptr() == place
    torch.testing.assert_close(matrix, expected)
    assert not _cholesky_in_place(-torch.eye(3, dtype=torch.float64))
