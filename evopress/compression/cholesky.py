"""Cholesky factor of a damped Hessian, which all levels and layers of an input share, and the sweep that uses it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.util.errors import CompressionError

INNER_CHUNK = 16
"""Columns that a sweep updates one vector at a time: wider chunks do more work outside of matrix products."""
_DAMPING_LIMIT = 10.0
_PANEL = 512
"""Rows that are worked on together: what a panel takes beside the matrix is small, and its products are large."""


@dataclass(frozen=True)
class DampedCholesky:
    """H + shift I = R R^T with R upper triangular (a dead input's diagonal counts as 1)."""

    reversed_unit: Tensor
    """R_ij / R_jj with both axes reversed, unit lower triangular, float64 [columns, columns]."""
    pivots: Tensor
    """R_jj, float64 [columns]."""
    shift: float
    """What was added to the diagonal."""
    damping: float
    """Share of the mean diagonal with which it succeeded."""


def damped_cholesky(hessian: Tensor, damping: float) -> DampedCholesky:
    """Factorize in float64: with few tokens the Hessian is close to singular.

    Works in the memory of the result: at the 28,672 inputs of a 70B model, one such matrix takes 6.6 GB.

    Args:
        hessian: X^T X, [columns, columns].
        damping: share of the mean diagonal (over inputs that are not dead) added to it; raised tenfold while Cholesky
            fails.

    Raises:
        CompressionError: it fails even when the damping is many times the mean diagonal.
    """
    diagonal = hessian.diagonal().double()
    dead = diagonal == 0
    scale = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    share = damping
    while share <= _DAMPING_LIMIT:
        shift = share * scale
        # Cholesky of the matrix with both axes reversed, reversed again, is the upper triangular R.
        lower = hessian.flip(0, 1).double()
        lower.diagonal().copy_((diagonal.masked_fill(dead, 1.0) + shift).flip(0))
        if _cholesky_in_place(lower):
            pivots = lower.diagonal().clone()
            return DampedCholesky(lower.div_(pivots), pivots.flip(0), shift, share)
        share *= 10
    raise CompressionError(
        f"Cholesky of the Hessian fails even with damping {share / 10:g}; calibrate on more tokens or exclude the layer"
    )


def _cholesky_in_place(matrix: Tensor) -> bool:
    """Replace a symmetric matrix by its lower triangular factor; whether that succeeded.

    LAPACK stores by columns, which for a symmetric matrix is its transpose; the upper factor of that, transposed, is
    the lower one.
    """
    transposed, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(transposed, upper=True, out=(transposed, failed))
    return not int(failed)


def invert_unit_lower(matrix: Tensor) -> None:
    """Replace a unit lower triangular matrix (zeros above its diagonal) by its inverse, a panel of rows at a time.

    For rows i and those before them, p: (L^-1)_ip = -(L_ii)^-1 L_ip (L^-1)_pp.
    """
    for begin in range(0, len(matrix), _PANEL):
        end = min(begin + _PANEL, len(matrix))
        identity = torch.eye(end - begin, dtype=matrix.dtype, device=matrix.device)
        own = torch.linalg.solve_triangular(matrix[begin:end, begin:end], identity, upper=False, unitriangular=True)
        matrix[begin:end, :begin] = own @ (matrix[begin:end, :begin] @ matrix[:begin, :begin]).neg_()
        matrix[begin:end, begin:end] = own


def forward(matrix: Tensor) -> Tensor:
    """A matrix with both axes reversed, in float32; in panels, for want of memory for a second one in float64."""
    result = torch.empty(matrix.shape, device=matrix.device)
    for begin in range(0, len(matrix), _PANEL):
        panel = matrix[begin : begin + _PANEL]
        end = len(matrix) - begin
        result[end - len(panel) : end] = panel.flip(0, 1)
    return result


def sweep_columns(
    panel: Tensor,
    feedback: Tensor,
    widths: Sequence[int],
    column: Callable[[int], None],
    reach: Callable[[int, int, int], None] = lambda width, begin, end: None,
    *,
    alpha: float = 1.0,
) -> None:
    """Compress columns one after the other; deviations of those done are fed back to later ones by whole chunks.

    Args:
        panel: [columns, everything else]; of columns done it holds what they feed back.
        feedback: by how much a column (second index) changes with one before it, [columns, columns].
        widths: of nested chunks, wide to narrow, the last of them 1.
        column: compresses one column, to which all before it have contributed.
        reach: is told the width, begin and end of each chunk that is begun.
        alpha: factor of the feedback.
    """

    def visit(start: int, stop: int, widths: Sequence[int]) -> None:
        """Columns to which all before ``start`` have contributed."""
        width, finer = widths[0], widths[1:]
        for begin in range(start, stop, width):
            end = min(begin + width, stop)
            if begin > start:
                panel[begin:end].addmm_(feedback[start:begin, begin:end].t(), panel[start:begin], alpha=alpha)
            reach(width, begin, end)
            if finer:
                visit(begin, end, finer)
            else:
                column(begin)

    visit(0, len(panel), widths)
