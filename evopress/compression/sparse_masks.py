"""Choice of the weights that go: exactly so many of the lowest scores, or so many of every m neighbours."""

import numpy as np
import torch
from torch import Tensor


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
    """The ``count``-th lowest score; on a CPU by numpy, whose selection is vectorized."""
    if scores.device.type == "cpu":
        return float(np.partition(scores.numpy(), count - 1)[count - 1])
    return float(scores.kthvalue(count).values)


def ranks(scores: Tensor, dim: int) -> Tensor:
    """Rank of each score along a dimension, from 0; of equal scores the first one ranks lower (int64, same shape)."""
    order = scores.argsort(dim=dim, stable=True)
    places = torch.arange(scores.shape[dim], device=scores.device)
    shape = [1] * scores.ndim
    shape[dim] = -1
    return torch.empty_like(order).scatter_(dim, order, places.view(shape).expand_as(order))
