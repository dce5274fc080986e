"""Pruning to several sparsities at once: which weights go, and what that costs where the others stay as they are.

Exactly so many of the lowest scores go, or so many of every m neighbours. The scores here, those of magnitude and of
Wanda, need no change of the weights that are kept; SparseGPT, which does, has a file of its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evopress.compression.sparsity import Pruned, SparsityLevel, portions


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark exactly ``count`` of the lowest scores; of equal scores the first ones.

    Args:
        scores: float32 without NaN, [n].
        count: from 0 to n.

    Returns:
        bool [n].
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _order_statistic(scores, count)
    marked = scores <= threshold
    surplus = int(marked.count_nonzero()) - count
    if surplus:
        marked[(scores == threshold).nonzero()[-surplus:, 0]] = False
    return marked


def _order_statistic(scores: Tensor, count: int) -> float:
    """The ``count``-th lowest score; on a CPU by numpy, whose selection is vectorized.

    An accelerator sorts: `kthvalue` of a single row keeps to one of its many processors.
    """
    if scores.device.type == "cpu":
        return float(np.partition(scores.numpy(), count - 1)[count - 1])
    return float(scores.sort().values[count - 1])


def ranks(scores: Tensor, dim: int) -> Tensor:
    """Rank of each score along a dimension, from 0; of equal scores the first one ranks lower (int64, same shape)."""
    order = scores.argsort(dim=dim, stable=True)
    places = torch.arange(scores.shape[dim], device=scores.device)
    shape = [1] * scores.ndim
    shape[dim] = -1
    return torch.empty_like(order).scatter_(dim, order, places.view(shape).expand_as(order))


def magnitude(weights: Tensor, hessian: Tensor, levels: Sequence[SparsityLevel]) -> Pruned:
    """Remove the least absolute weights of each layer.

    Args:
        weights: [layers, rows, columns].
        hessian: X^T X of their input; for the errors only.
        levels: all unstructured, or all of patterns with the same m.
    """
    scores = weights.float().abs()
    return _prune(weights, hessian, levels, scores, scores.flatten(1)[:, None])


def wanda(weights: Tensor, hessian: Tensor, levels: Sequence[SparsityLevel]) -> Pruned:
    """Remove the least weights times the norm of their inputs, |w| ||X_j||, in each output row (arXiv 2306.11695).

    The norm is the root of the Hessian's diagonal. Rows share the exact count of removed weights evenly.

    Args:
        weights: [layers, rows, columns].
        hessian: X^T X of their input.
        levels: all unstructured, or all of patterns with the same m.
    """
    scores = weights.float().abs() * hessian.diagonal().sqrt()
    return _prune(weights, hessian, levels, scores, scores)


def _prune(
    weights: Tensor, hessian: Tensor, levels: Sequence[SparsityLevel], scores: Tensor, compared: Tensor
) -> Pruned:
    """Remove the lowest of each group of ``compared`` (scores as [layers, groups, members]), or of m neighbours."""
    if levels[0].pattern:
        compared = scores.unflatten(-1, (-1, levels[0].pattern[1])).flatten(1, 2)
    groups, members = compared.shape[1:]
    order = ranks(compared, -1)
    kept = torch.stack([order >= _limits(level, groups, members).to(order.device)[:, None] for level in levels]).view(
        len(levels), *weights.shape
    )
    pruned = weights * kept
    errors = torch.stack([_errors(weights, level, hessian) for level in pruned])
    return Pruned(pruned, kept, errors)


def _limits(level: SparsityLevel, groups: int, members: int) -> Tensor:
    """How many go from each group, [groups]."""
    return torch.tensor(portions(level.removed, [members] * groups))


def _errors(weights: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """tr(dW H dW^T) of each layer, float64 [layers]."""
    deviation = weights.float() - pruned.float()
    return torch.einsum("lrc,lrc->l", deviation @ hessian, deviation).double()
