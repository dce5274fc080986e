"""Level switches: the only move of the search (arXiv 2410.14649, section 3.2).

A switch raises one unit and lowers others of its group, so the budget holds by construction and no repair or penalty
is needed.
"""

import numpy as np
from numpy.typing import NDArray

from evopress.search.space import Candidate, Space

MOST_CHANGES = 10
"""Units that one switch may touch; wider trades between layers of unlike size are drawn again."""
ATTEMPTS = 20
"""Draws per wanted offspring before a small or nearly exhausted neighbourhood is given up."""


def make_offspring(
    parents: NDArray[np.int16], space: Space, count: int, rng: np.random.Generator, switches: int | None = None
) -> NDArray[np.int16]:
    """Mutate random ones of ``parents`` into ``count`` candidates that differ from them and from each other.

    Args:
        parents: [P, units], or one candidate [units].
        space: units, levels and budget.
        count: offspring wanted.
        rng: draws parents and switches.
        switches: level switches of each; None draws them (`draw_switches`).

    Returns:
        [n, units]; n < count only if so many neighbours could not be found.
    """
    parents = np.atleast_2d(parents)
    known = {parent.tobytes() for parent in parents}
    found: dict[bytes, Candidate] = {}
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            break
        parent = parents[rng.integers(len(parents))] if len(parents) > 1 else parents[0]
        child = mutate(parent, space, draw_switches(rng) if switches is None else switches, rng)
        if child.tobytes() not in known:
            found.setdefault(child.tobytes(), child)
    return np.array(list(found.values()), dtype=np.int16).reshape(-1, len(space.units))


def draw_switches(rng: np.random.Generator) -> int:
    """Number of switches of an offspring: min(U(1,3), U(1,3)), as in the paper."""
    return int(rng.integers(1, 4, size=2).min())


def mutate(parent: Candidate, space: Space, switches: int, rng: np.random.Generator) -> Candidate:
    """Apply ``switches`` level switches; those for which no trade is found are left out."""
    child = parent
    for _ in range(switches):
        child = next((new for _ in range(ATTEMPTS) if (new := switch_levels(child, space, rng)) is not None), child)
    return child


def switch_levels(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """Raise a random unit, lower random others of its group until the budget holds, spend what is left over.

    Where all steps of the group cost the same, that is one raised and one lowered.

    Returns:
        A new candidate, or None if the draw led nowhere.
    """
    raisable = np.flatnonzero(candidate < space.top)
    if not len(raisable):
        return None
    raised = _pick(raisable, rng)
    group = int(space.group_of[raised])
    members, budget = space.members[group], space.group_budgets[group]
    new = candidate.copy()
    new[raised] += 1
    lowered = lower_to_budget(new, space, members[members != raised], budget - space.cost_of(new, members), rng)
    if lowered is None:
        return None
    keep = np.setdiff1d(members, lowered)
    spend_slack(new, space, keep, budget - space.cost_of(new, members), rng)
    return new if np.count_nonzero(new != candidate) <= MOST_CHANGES else None


def lower_to_budget(
    candidate: Candidate, space: Space, units: NDArray[np.int64], slack: int, rng: np.random.Generator
) -> list[int] | None:
    """Lower random ones of ``units`` in place, a level at a time, until ``slack`` is not negative.

    Returns:
        The units that were lowered, or None if all of them are at their lowest before the budget holds.
    """
    lowered = []
    while slack < 0:
        options = units[candidate[units] > 0]
        if not len(options):
            return None
        unit = _pick(options, rng)
        slack += int(space.costs[unit, candidate[unit]] - space.costs[unit, candidate[unit] - 1])
        candidate[unit] -= 1
        lowered.append(unit)
    return lowered


def spend_slack(
    candidate: Candidate, space: Space, units: NDArray[np.int64], slack: int, rng: np.random.Generator
) -> None:
    """Raise random ones of ``units`` in place, a level at a time, as long as one fits into ``slack``."""
    while slack > 0:
        free = units[candidate[units] < space.top[units]]
        steps = space.costs[free, candidate[free] + 1] - space.costs[free, candidate[free]]
        options = free[steps <= slack]
        if not len(options):
            return
        unit = _pick(options, rng)
        slack -= int(space.costs[unit, candidate[unit] + 1] - space.costs[unit, candidate[unit]])
        candidate[unit] += 1


def _pick(options: NDArray[np.int64], rng: np.random.Generator) -> int:
    return int(options[rng.integers(len(options))])
