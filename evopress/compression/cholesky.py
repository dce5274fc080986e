"""Cholesky factor of a damped Hessian: the one expensive step that all levels and layers of an input share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.errors import CompressionError

_DAMPING_LIMIT = 10.0


@dataclass(frozen=True)
class DampedCholesky:
    """H + shift I = R R^T with R upper triangular (a dead input's diagonal counts as 1)."""

    upper: Tensor
    """R, float64 [columns, columns]."""
    shift: float
    """What was added to the diagonal."""
    damping: float
    """Share of the mean diagonal with which it succeeded."""


def damped_cholesky(hessian: Tensor, damping: float) -> DampedCholesky:
    """Factorize in float64: with few tokens the Hessian is close to singular.

    Args:
        hessian: X^T X, [columns, columns].
        damping: share of the mean diagonal (over inputs that are not dead) added to it; raised tenfold while Cholesky
            fails.

    Raises:
        CompressionError: it fails even when the damping is many times the mean diagonal.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    dead = diagonal == 0
    scale = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = 1.0
    share, shift = damping, 0.0
    while share <= _DAMPING_LIMIT:
        diagonal += share * scale - shift
        shift = share * scale
        # Cholesky of the matrix with both axes reversed, reversed again, is the upper triangular R.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            return DampedCholesky(lower.flip(0, 1), shift, share)
        share *= 10
    raise CompressionError(
        f"Cholesky of the Hessian fails even with damping {share / 10:g}; calibrate on more tokens or exclude the layer"
    )
