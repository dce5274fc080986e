"""Candidates: where searches start, those from all over the space, and the moves from one to the next.

The move is the level switch (arXiv 2410.14649, section 3.2): it raises one unit and lowers others of its group, so the
budget holds by construction and no penalty is needed. Where levels are of several variants, there are others besides
(`moves`).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from evopress.search.budget import Units, at_random, brought_to_budget, fill_budget, repair
from evopress.search.space import Candidate, Space

MOST_CHANGES = 10
"""Units that one switch may touch; wider trades between layers of unlike size are drawn again."""
Move = Callable[[Candidate, Space, np.random.Generator], Candidate | None]
"""Makes another candidate within the budget of one, or None where the draw led nowhere."""
ATTEMPTS = 20
"""Draws per wanted candidate before a small or nearly exhausted neighbourhood is given up."""


def uniform_start(space: Space) -> Candidate:
    """Each unit at its lowest level that costs at least its uniform share of its group's budget (else its highest).

    Where the target is a level, this is the uniform candidate and meets the budget; otherwise it may cost too much.
    Modules that hold layers are kept.
    """
    candidate = space.top.copy()
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        sized = np.setdiff1d(members, space.modules)
        parameters = sum(space.units[unit].parameters for unit in sized)
        for unit in sized:
            levels = space.units[unit].levels
            costs = [level.bytes if space.in_bytes else level.cost for level in levels]
            candidate[unit] = _level_of_share(costs, budget * space.units[unit].parameters, parameters)
    return candidate


def uniform_starts(space: Space) -> list[Candidate]:
    """Uniform candidates that meet the budget: the uniform start, or, of several variants, one of each.

    One of some variants has every layer at their highest level that takes no more than so many bytes for each weight,
    the most for which the budget holds, and spends what is left from the first layer on.
    """
    if not space.is_joint:
        uniform = uniform_start(space)
        return [uniform] if space.fits(uniform) else []
    held = [unit for unit in space.units if not unit.modules]
    sources = dict.fromkeys(level.source for unit in held for level in unit.levels)
    found = [start for source in sources if (start := _uniform_of(source, space)) is not None]
    return list({start.tobytes(): start for start in found}.values())


def _uniform_of(source: str, space: Space) -> Candidate | None:
    """The uniform candidate of one of several variants; None if even its lowest levels exceed the budget.

    Layers without a level of these are at their lowest.
    """
    of_unit = [[i for i, level in enumerate(unit.levels) if level.source == source] for unit in space.units]
    shares = {
        unit.levels[index].bytes / unit.parameters
        for unit, levels in zip(space.units, of_unit, strict=True)
        for index in levels
        if not unit.modules
    }
    best = None
    for share in sorted(shares):
        levels = [
            max((i for i in own if unit.levels[i].bytes / unit.parameters <= share), default=(own or [0])[0])
            for unit, own in zip(space.units, of_unit, strict=True)
        ]
        candidate = np.where([bool(unit.modules) for unit in space.units], space.top, levels).astype(np.int16)
        if not space.fits(candidate):
            break
        best = candidate
    if best is not None:
        for members, slack in zip(space.members, space.slacks(best).tolist(), strict=True):
            free = np.setdiff1d(members, space.modules)
            fill_budget(best, space, free, slack, lambda units, slack: int(units[0]))
    return best


def _level_of_share(prices: Sequence[int], share: int, scale: int) -> int:
    """Index of the level whose cost equals share / scale (within rounding); otherwise the next more expensive one."""
    costs = [price * scale for price in prices]  # scaled instead of divided: exact
    near = [index for index, cost in enumerate(costs) if abs(cost - share) < scale]
    if len(near) == 1:
        return near[0]
    return next((index for index, cost in enumerate(costs) if cost >= share), len(costs) - 1)


def uniform_of_size(space: Space) -> Candidate:
    """The highest cost of a weight that fits everywhere, and the rest of the bytes spent from the first unit on.

    A unit that has no level of this cost takes the next below, or its lowest. While bytes are left, units go up by a
    level each, in their order, as far as the bytes go.
    """
    shares = [[level.cost / unit.parameters for level in unit.levels] for unit in space.units]
    found = np.zeros(len(space.units), dtype=np.int16)
    for most in sorted({share for own in shares for share in own}):
        counts = [sum(share <= most for share in own) for own in shares]
        candidate = np.array([max(0, count - 1) for count in counts], dtype=np.int16)
        if not space.fits(candidate):
            break
        found = candidate
    start = found.copy()

    def first_untouched(units: Units, slack: int) -> int | None:
        """The first unit that still has its uniform level."""
        untouched = units[found[units] == start[units]]
        return int(untouched[0]) if len(untouched) else None

    for members, slack in zip(space.members, space.slacks(found).tolist(), strict=True):
        fill_budget(found, space, members, slack, first_untouched)
    return found


def initial_candidates(space: Space, count: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """The uniform start if it meets the budget, else up to ``count`` distinct random candidates near it.

    Returns:
        [n, units], each within the budget and, in each group, as close to it as its steps allow.
    """
    uniform = uniform_start(space)
    if space.fits(uniform):
        return uniform[None]
    if len(space.modules):
        return _distinct(count, len(space.units), lambda: brought_to_budget(uniform, space, rng))
    return _distinct(count, len(space.units), lambda: _near(uniform, space, rng))


def _near(uniform: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """Lower random units of the uniform start, each once before any twice, until every group keeps to its budget."""
    candidate, touched = uniform.copy(), np.zeros(len(uniform), dtype=bool)

    def untouched_first(units: Units, slack: int) -> int:
        """A random unit that has not been lowered yet, or any where all have been."""
        fresh = units[~touched[units]]
        options = fresh if len(fresh) else units
        unit = int(options[rng.integers(len(options))])
        touched[unit] = True
        return unit

    for members, budget in zip(space.members, space.group_budgets, strict=True):
        repair(candidate, space, members, budget - space.cost_of(candidate, members), untouched_first)
        fill_budget(candidate, space, members, budget - space.cost_of(candidate, members), at_random(rng))
    return candidate


def random_candidates(space: Space, count: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """Draw ``count`` distinct candidates that meet the budget, each group as close to its own as its steps allow.

    Returns:
        [n, units]; n < count only if the space seems to hold no more.
    """
    return _distinct(count, len(space.units), lambda: random_candidate(space, rng))


def random_candidate(space: Space, rng: np.random.Generator) -> Candidate:
    """Every unit at a level drawn uniformly; then random units go down, or up, until the budget is met.

    Where all units of a group have the same two levels, each choice that meets the budget is as likely as any other.
    """
    return brought_to_budget(rng.integers(0, space.top, endpoint=True).astype(np.int16), space, rng)


def make_offspring(
    parents: NDArray[np.int16],
    space: Space,
    count: int,
    rng: np.random.Generator,
    switches: int | None = None,
    move: Move | None = None,
) -> NDArray[np.int16]:
    """Mutate random ones of ``parents`` into ``count`` candidates that differ from them and from each other.

    Args:
        parents: [P, units], or one candidate [units].
        space: units, levels and budget.
        count: offspring wanted.
        rng: draws parents and switches.
        switches: moves of each; None draws their number (`draw_switches`).
        move: makes one; None is the level switch.

    Returns:
        [n, units]; n < count only if so many neighbours could not be found.
    """
    parents = np.atleast_2d(parents)
    known = {parent.tobytes() for parent in parents}

    def child() -> Candidate | None:
        """A random parent with some switches; None where that is known already."""
        parent = parents[rng.integers(len(parents))] if len(parents) > 1 else parents[0]
        new = mutate(parent, space, draw_switches(rng) if switches is None else switches, rng, move)
        return None if new.tobytes() in known else new

    return _distinct(count, len(space.units), child)


def draw_switches(rng: np.random.Generator) -> int:
    """Number of switches of an offspring: min(U(1,3), U(1,3)), as in the paper."""
    return int(rng.integers(1, 4, size=2).min())


def mutate(
    parent: Candidate, space: Space, switches: int, rng: np.random.Generator, move: Move | None = None
) -> Candidate:
    """Apply ``switches`` moves, which are level switches by default; those for which no trade is found are left out."""
    child, move = parent, move or switch_levels
    for _ in range(switches):
        child = next((new for _ in range(ATTEMPTS) if (new := move(child, space, rng)) is not None), child)
    return child


def switch_levels(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """Raise a random unit, lower random others of its group until the budget holds, fill what is left over.

    Returns:
        The new candidate, or None if the draw led nowhere.
    """
    units, trades = np.arange(len(candidate)), space.tradable(candidate)
    raisable = np.flatnonzero(trades & (space.up[units, candidate] >= 0))
    if not len(raisable):
        return None
    raised = int(raisable[rng.integers(len(raisable))])
    group = int(space.group_of[raised])
    members, budget = space.members[group], space.group_budgets[group]
    new = candidate.copy()
    new[raised] = space.up[raised, candidate[raised]]
    pool = members[trades[members]]
    others = pool[pool != raised]
    lowered = repair(new, space, others, budget - space.cost_of(new, members), at_random(rng))
    if lowered is None:
        return None
    keep = np.setdiff1d(pool, lowered)
    fill_budget(new, space, keep, budget - space.cost_of(new, members), at_random(rng))
    return new if np.count_nonzero(new != candidate) <= MOST_CHANGES else None


def _distinct(count: int, units: int, draw: Callable[[], Candidate | None]) -> NDArray[np.int16]:
    """Up to ``count`` distinct candidates, [n, units]; a draw that gives None, or one again, is a draw in vain."""
    found: dict[bytes, Candidate] = {}
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            break
        if (candidate := draw()) is not None:
            found.setdefault(candidate.tobytes(), candidate)
    return np.array(list(found.values()), dtype=np.int16).reshape(-1, units)
