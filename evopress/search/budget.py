"""The budget: how a candidate is brought to it, and the levels of least summed error within it.

Units of a group trade levels. To *repair* a candidate is to lower units until its group keeps to the budget; to *fill*
the budget is to raise units while a step up fits into what is left. Which unit goes next is for the caller to say.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from evopress.search.space import Candidate, Space

Units = NDArray[np.int64]
"""Numbers of units."""
Errors = NDArray[np.float64]
"""Of each level of each unit, [units, most levels]; what lies beyond a unit's own levels is not read."""
Choose = Callable[[Units, int], int | None]
"""Which of some units goes next, given the slack (what the group may still spend, negative beyond its budget); None
ends the filling."""
HALVINGS = 100
"""Steps of the bisection for a price, of a unit of cost or of a multiply-add, ..."""
PRICES = (-60.0, 20.0)
"""... between these powers of ten."""


def at_random(rng: np.random.Generator) -> Choose:
    """Any unit, as long as the budget is not met exactly."""
    return lambda units, slack: int(units[rng.integers(len(units))]) if slack else None


def repair(candidate: Candidate, space: Space, units: Units, slack: int, choose: Choose) -> list[int] | None:
    """Lower ``units`` in place, a level of one at a time (`Space.down`), until ``slack`` is not negative.

    Returns:
        The units that were lowered, or None if all of them are at their lowest before the budget holds.
    """
    lowered: list[int] = []
    while slack < 0:
        options = units[candidate[units] > 0]
        unit = choose(options, slack) if len(options) else None
        if unit is None:
            return None
        lower = space.down[unit, candidate[unit]]
        slack += int(space.costs[unit, candidate[unit]] - space.costs[unit, lower])
        candidate[unit] = lower
        lowered.append(unit)
    return lowered


def fill_budget(candidate: Candidate, space: Space, units: Units, slack: int, choose: Choose) -> None:
    """Raise ``units`` in place, a level of one at a time (`Space.up`), as long as a step fits into ``slack``."""
    while True:
        free = units[space.up[units, candidate[units]] >= 0]
        options = free[step_costs(candidate, space, free) <= slack]
        unit = choose(options, slack) if len(options) else None
        if unit is None:
            return
        higher = space.up[unit, candidate[unit]]
        slack -= int(space.costs[unit, higher] - space.costs[unit, candidate[unit]])
        candidate[unit] = higher


def step_costs(candidate: Candidate, space: Space, units: Units) -> NDArray[np.int64]:
    """What it costs to raise each of ``units`` by one level."""
    return space.costs[units, space.up[units, candidate[units]]] - space.costs[units, candidate[units]]


def brought_to_budget(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """The candidate, with random units lowered in each group that spends too much, and raised in one that can spend.

    Where lowering layers is not enough, or the bound on multiply-adds does not hold, random modules that hold some are
    dropped; where even one is too many, the one that costs least stays.
    """
    if len(space.modules):
        return _brought_with_modules(candidate, space, rng)
    fitting = candidate.copy()
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        repair(fitting, space, members, budget - space.cost_of(fitting, members), at_random(rng))
        fill_budget(fitting, space, members, budget - space.cost_of(fitting, members), at_random(rng))
    return fitting


def _brought_with_modules(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    fitting = space.canonical(candidate.copy())
    kept = space.modules[fitting[space.modules] > 0]
    if not len(kept):
        kept = rng.choice(space.modules, 1)
        fitting[kept] = 1
    going = rng.permutation(kept).tolist()
    while going and not (
        space.keeps_work(fitting)
        and repair(fitting, space, traded(fitting, space), spare(fitting, space), at_random(rng)) is not None
    ):
        fitting[going.pop()] = 0
        space.canonical(fitting)
    keep_one(fitting, space)
    fill_budget(fitting, space, traded(fitting, space), spare(fitting, space), at_random(rng))
    return fitting


def traded(candidate: Candidate, space: Space) -> Units:
    """Numbers of the units that may go a level up or down alone."""
    return np.flatnonzero(space.tradable(candidate))


def spare(candidate: Candidate, space: Space) -> int:
    """What a candidate may still spend in all, negative where it exceeds the budget."""
    return space.budget - space.cost_of(candidate)


# --- levels of least summed error ------------------------------------------------------------------------------------


def least_error(space: Space, errors: Errors, resolution: int) -> Candidate:
    """Levels of the least sum of errors within every group's budget, by dynamic programming over units and budgets.

    This is the multiple-choice knapsack; a module that holds layers is one choice with them: its error at the lowest
    level, or theirs. It is solved exactly where the budget, counted in the greatest common measure
    of all costs, has at most ``resolution`` steps. Where it has more, costs are rounded up to coarser steps, so that
    the budget holds; what is then left of it goes, a level at a time, to where it lessens the error most. A bound on
    multiply-adds is kept by a price on them (`_within_work`), so the sum is then no more than near the least.

    Returns:
        [units].
    """
    return _within_work(space, errors, lambda priced: _least_error(space, priced, resolution))


def _within_work(space: Space, errors: Errors, solve: Callable[[Errors], Candidate]) -> Candidate:
    """What ``solve`` finds with the lowest price on multiply-adds at which they keep to their bound.

    Each is an error more for a module that is kept: the Lagrangian relaxation of the bound.
    """
    found = solve(errors)
    if space.keeps_work(found):
        return found

    def at(price: float) -> Candidate:
        """What is found when a multiply-add costs so much."""
        priced = errors.copy()
        priced[space.modules, 1] += price * space.saved[space.modules]
        return solve(priced)

    return _at_lowest_price(at, space.keeps_work, found)


def _at_lowest_price(
    at: Callable[[float], Candidate], holds: Callable[[Candidate], bool], otherwise: Candidate
) -> Candidate:
    """What is found at the lowest price at which a bound holds, by bisection; ``otherwise`` where it holds at none."""
    low, high = PRICES
    best = otherwise
    for _ in range(HALVINGS):
        found = at(10.0 ** ((low + high) / 2))
        if holds(found):
            best, high = found, (low + high) / 2
        else:
            low = (low + high) / 2
    return best


def _least_error(space: Space, errors: Errors, resolution: int) -> Candidate:
    candidate = np.zeros(len(space.units), dtype=np.int16)

    def greatest_gain(units: Units, slack: int) -> int | None:
        """The unit of which a level more lessens the error most; None where none does."""
        gains = _gains(candidate, space, errors, units)
        best = int(gains.argmax())
        return int(units[best]) if gains[best] > 0 else None

    for members, budget in zip(space.members, space.group_budgets, strict=True):
        width = int(space.top[members].max()) + 1
        extra = space.costs[members, :width] - space.costs[members, :1]
        known = np.where(np.arange(width) > space.top[members, None], np.inf, errors[members, :width])
        slack = budget - space.cost_of(candidate, members)
        measure = max(1, math.gcd(*extra.flatten().tolist()))
        step = measure * max(1, -(-slack // (measure * resolution)))
        candidate[members] = _solved(-(-extra // step), known, slack // step, space.holder[members])
        keep_one(candidate, space)
        free = members[space.tradable(candidate)[members]]
        fill_budget(candidate, space, free, budget - space.cost_of(candidate, members), greatest_gain)
    return candidate


def keep_one(candidate: Candidate, space: Space) -> None:
    """Where all modules that hold layers are dropped, keep the one that costs least, and all else at its lowest."""
    if len(space.modules) and not candidate[space.modules].any():
        candidate[:] = 0
        candidate[space.modules[space.costs[space.modules, 1].argmin()]] = 1


def _solved(costs: NDArray[np.int64], errors: NDArray[np.float64], budget: int, holder: NDArray[np.int64]) -> Candidate:
    """Levels of least summed error with summed costs of at most ``budget``.

    Args:
        costs: whole steps, 0 for the lowest level, [units, levels].
        errors: [units, levels].
        budget: in steps.
        holder: unit of modules that each unit leaves with, [units]; -1 where it stays. Where there is one, units are
            numbered by their rows here.
    """
    best = np.zeros(budget + 1)  # least error of the units so far, by what they may spend
    choices = np.zeros((len(costs), budget + 1), dtype=np.int16)

    def spent(before: NDArray[np.float64], unit: int, levels: slice = slice(None)) -> NDArray[np.float64]:
        """The least error with one more unit, whose choice is noted."""
        after = np.full(budget + 1, np.inf)
        for level in range(costs.shape[1])[levels]:
            price, loss = int(costs[unit, level]), float(errors[unit, level])
            if price > budget or loss == math.inf:
                continue
            new = before[: budget + 1 - price] + loss
            better = new < after[price:]
            after[price:][better] = new[better]
            choices[unit, price:][better] = level
        return after

    modules = np.unique(holder[holder >= 0]).tolist()
    always = [unit for unit in range(len(costs)) if holder[unit] < 0 and unit not in modules]
    for unit in always:
        best = spent(best, unit)
    held = {module: np.flatnonzero(holder == module).tolist() for module in modules}
    for module, inside in held.items():
        kept, dropped = spent(best, module, slice(1, 2)), best + errors[module, 0]
        for unit in inside:
            kept = spent(kept, unit)
        choices[module] = kept < dropped
        best = np.minimum(kept, dropped)
    levels = np.zeros(len(costs), dtype=np.int16)
    for module, inside in reversed(held.items()):
        levels[module] = choices[module, budget]
        for unit in reversed(inside if levels[module] else []):
            levels[unit] = choices[unit, budget]
            budget -= int(costs[unit, levels[unit]])
        budget -= int(costs[module, levels[module]])
    for unit in reversed(always):
        levels[unit] = choices[unit, budget]
        budget -= int(costs[unit, levels[unit]])
    return levels


def relaxed_least_error(space: Space, errors: Errors) -> Candidate:
    """Levels of nearly the least sum of errors: the Lagrangian relaxation of the knapsack, then greedy filling.

    Modules that hold layers are kept where that and the best levels of their layers come to less than without them.
    """
    return _within_work(space, errors, lambda priced: _relaxed_least_error(space, priced))


def _relaxed_least_error(space: Space, errors: Errors) -> Candidate:
    candidate = np.zeros(len(space.units), dtype=np.int16)

    def best_gain_for_its_cost(units: Units, slack: int) -> int | None:
        """The unit of which a level more lessens the error most for what it costs; None where none does."""
        gains = _gains(candidate, space, errors, units)
        best = int(np.argmax(gains / np.maximum(step_costs(candidate, space, units), 1)))
        return int(units[best]) if gains[best] > 0 else None

    for members, budget in zip(space.members, space.group_budgets, strict=True):
        candidate[members] = _least_at_one_price(space, errors, members, budget)
        keep_one(candidate, space)
        free = members[space.tradable(candidate)[members]]
        fill_budget(candidate, space, free, budget - space.cost_of(candidate, members), best_gain_for_its_cost)
    return candidate


def _least_at_one_price(space: Space, errors: Errors, members: Units, budget: int) -> Candidate:
    """Best levels at the lowest price per unit of cost at which the budget holds."""
    costs, known = space.costs[members].astype(np.float64), errors[members]
    beyond = np.arange(costs.shape[1]) > space.top[members, None]

    def at(price: float) -> Candidate:
        """The best levels when a unit of cost costs so much."""
        values = np.where(beyond, np.inf, known + price * costs)
        levels = values.argmin(axis=1).astype(np.int16)
        if len(space.modules):  # which trade with all others: members are all units
            held = space.holder >= 0
            inside = np.bincount(space.holder[held], values.min(axis=1)[held], minlength=len(values))
            levels[space.modules] = (values[:, 1] + inside < values[:, 0])[space.modules]
            space.canonical(levels)
        return levels

    lowest = np.zeros(len(members), dtype=np.int16)
    return _at_lowest_price(at, lambda levels: bool(space.costs[members, levels].sum() <= budget), lowest)


def _gains(candidate: Candidate, space: Space, errors: Errors, units: Units) -> NDArray[np.float64]:
    """What raising each of ``units`` by a level lessens the error by."""
    return errors[units, candidate[units]] - errors[units, space.up[units, candidate[units]]]
