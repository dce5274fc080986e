"""Where the search starts: as evenly as the budget allows."""

import numpy as np
from numpy.typing import NDArray

from evopress.search.evolution.mutation import ATTEMPTS, lower_to_budget, spend_slack
from evopress.search.space import Candidate, Space, Unit


def even_candidate(space: Space) -> Candidate:
    """Each unit at its lowest level that costs at least its even share of its group's budget (else its highest).

    Where the target is a level, this is the uniform candidate and meets the budget; otherwise it may cost too much.
    """
    candidate = space.top.copy()
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        parameters = sum(space.units[unit].parameters for unit in members)
        for unit in members:
            candidate[unit] = _even_level(space.units[unit], budget * space.units[unit].parameters, parameters)
    return candidate


def _even_level(unit: Unit, share: int, scale: int) -> int:
    """The level that costs share/scale, give or take the fraction of 1 that its rounding took; else the next dearer."""
    costs = [level.cost * scale for level in unit.levels]  # scaled instead of divided: exact
    near = [index for index, cost in enumerate(costs) if abs(cost - share) < scale]
    if len(near) == 1:
        return near[0]
    return next((index for index, cost in enumerate(costs) if cost >= share), len(costs) - 1)


def initial_candidates(space: Space, count: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """The even candidate if it meets the budget, else up to ``count`` distinct random ones near it.

    Returns:
        [n, units], each within the budget and, in each group, as close to it as its steps allow.
    """
    even = even_candidate(space)
    if space.fits(even):
        return even[None]
    found: dict[bytes, Candidate] = {}
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            break
        candidate = _random_candidate(space, even, rng)
        found.setdefault(candidate.tobytes(), candidate)
    return np.array(list(found.values()), dtype=np.int16)


def _random_candidate(space: Space, even: Candidate, rng: np.random.Generator) -> Candidate:
    """Lower random units of ``even``, each once before any twice, until every group keeps to its budget."""
    candidate = even.copy()
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        untouched = members.copy()
        while (slack := budget - space.cost_of(candidate, members)) < 0:
            options = untouched[candidate[untouched] > 0]
            if not len(options):
                lower_to_budget(candidate, space, members, slack, rng)
                break
            unit = options[rng.integers(len(options))]
            candidate[unit] -= 1
            untouched = untouched[untouched != unit]
        spend_slack(candidate, space, members, budget - space.cost_of(candidate, members), rng)
    return candidate
