"""The multiple-choice knapsack: one level for each unit, the least summed error within the budget."""

import math

import numpy as np
from numpy.typing import NDArray

from evopress.search.space import Candidate, Space


def least_error(space: Space, errors: NDArray[np.float64], resolution: int) -> Candidate:
    """Levels of the least sum of errors within every group's budget, by dynamic programming over units and budgets.

    Exact where the budget, counted in the greatest common measure of all costs, has at most ``resolution`` steps.
    Where it has more, costs are rounded up to coarser steps, so that the budget holds; what is then left of it goes,
    a level at a time, to where it lessens the error most.

    Args:
        space: units, levels and budgets.
        errors: of each level of each unit, [units, most levels]; what lies beyond a unit's own levels is not read.
        resolution: most steps that a budget is cut into.

    Returns:
        [units].
    """
    candidate = np.zeros(len(space.units), dtype=np.int16)
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        width = int(space.top[members].max()) + 1
        extra = space.costs[members, :width] - space.costs[members, :1]
        known = np.where(np.arange(width) > space.top[members, None], np.inf, errors[members, :width])
        slack = budget - space.cost_of(candidate, members)
        measure = max(1, math.gcd(*extra.flatten().tolist()))
        step = measure * max(1, -(-slack // (measure * resolution)))
        candidate[members] = _choose(-(-extra // step), known, slack // step)
        _fill(candidate, space, errors, members, budget)
    return candidate


def _choose(costs: NDArray[np.int64], errors: NDArray[np.float64], budget: int) -> Candidate:
    """Levels of least summed error with summed costs of at most ``budget``.

    Args:
        costs: whole steps, 0 for the lowest level, [units, levels].
        errors: [units, levels].
        budget: in steps.
    """
    best = np.zeros(budget + 1)  # least error of the units so far, by what they may spend
    choices = np.zeros((len(costs), budget + 1), dtype=np.int16)
    for unit, (prices, losses) in enumerate(zip(costs.tolist(), errors.tolist(), strict=True)):
        before, best = best, np.full(budget + 1, np.inf)
        for level, (price, loss) in enumerate(zip(prices, losses, strict=True)):
            if price > budget or loss == math.inf:
                continue
            new = before[: budget + 1 - price] + loss
            better = new < best[price:]
            best[price:][better] = new[better]
            choices[unit, price:][better] = level
    levels = np.zeros(len(costs), dtype=np.int16)
    for unit in reversed(range(len(costs))):
        levels[unit] = choices[unit, budget]
        budget -= int(costs[unit, levels[unit]])
    return levels


def _fill(
    candidate: Candidate, space: Space, errors: NDArray[np.float64], members: NDArray[np.int64], budget: int
) -> None:
    """Raise units in place, the greatest gain first, while a step fits that lessens the error."""
    while True:
        units = members[candidate[members] < space.top[members]]
        now, above = candidate[units], candidate[units] + 1
        steps = space.costs[units, above] - space.costs[units, now]
        gains = errors[units, now] - errors[units, above]
        possible = (steps <= budget - space.cost_of(candidate, members)) & (gains > 0)
        if not possible.any():
            return
        candidate[units[np.where(possible, gains, -np.inf).argmax()]] += 1
