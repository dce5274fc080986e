"""Candidates from all over the space, for random search."""

import numpy as np
from numpy.typing import NDArray

from evopress.search.evolution.mutation import ATTEMPTS, lower_to_budget, spend_slack
from evopress.search.space import Candidate, Space


def random_candidates(space: Space, count: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """Draw ``count`` distinct candidates that meet the budget, each group as close to its own as its steps allow.

    Returns:
        [n, units]; n < count only if the space seems to hold no more.
    """
    found: dict[bytes, Candidate] = {}
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            break
        candidate = random_candidate(space, rng)
        found.setdefault(candidate.tobytes(), candidate)
    return np.array(list(found.values()), dtype=np.int16)


def random_candidate(space: Space, rng: np.random.Generator) -> Candidate:
    """Every unit at a level drawn uniformly; then random units go down, or up, until the budget is met.

    Where all units of a group have the same two levels, each choice that meets the budget is as likely as any other.
    """
    candidate = rng.integers(0, space.top, endpoint=True).astype(np.int16)
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        lower_to_budget(candidate, space, members, budget - space.cost_of(candidate, members), rng)
        spend_slack(candidate, space, members, budget - space.cost_of(candidate, members), rng)
    return candidate
