"""Pruning by a score of each weight, without changing those that are kept: by magnitude, and Wanda."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evopress.compression.pruned import Pruned
from evopress.compression.sparse_masks import ranks
from evopress.compression.sparsity_levels import SparsityLevel, portions


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
