"""Moves of a search over several variants: what a level switch cannot do, or only by way of worse candidates.

A switch keeps to the variants of each level: it takes an integer of 3 bits to one of 4, whatever sparse levels lie
between. So there are moves across variants and modules besides. Each move of an offspring is drawn anew:

| move | odds | what it does |
| --- | --- | --- |
| switch | 2 | the paper's: a random layer goes a level up |
| jump | 1 | a random layer takes any of its levels |
| family | 1, with several variants of layers | a random layer takes a level of others, near in bytes |
| module | 1, where modules may be dropped | a third each: drop one, restore one, exchange two |

Random layers that were not moved themselves then pay, a level down at a time, until the budget holds, and others go up
while a step fits: so the bytes of a dropped module are spent. Where a module takes the place of
another of its kind, its layers take the levels of that one's; one that is restored otherwise has its layers at levels
of random others.
"""

import numpy as np

from evopress.search.budget import Units, at_random, fill_budget, repair, traded
from evopress.search.candidates import MOST_CHANGES, Move, switch_levels
from evopress.search.space import Candidate, Space


def move_in(space: Space) -> Move:
    """The move of a space: the level switch, or, where levels are of several variants, one of those above."""
    return joint_move if space.is_joint else switch_levels


def joint_move(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """A candidate one move away, within the budget; None if the draw led nowhere."""
    moves: list[Move] = [switch_levels, switch_levels, jump]
    if len(space.mixed):
        moves.append(change_family)
    if len(space.modules):
        moves.append((drop_module, restore_module, exchange_modules)[rng.integers(3)])
    new = moves[rng.integers(len(moves))](candidate, space, rng)
    if new is not None:
        _fill(new, space, traded(new, space), rng)
    return new


def jump(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """A random layer at any of its levels."""
    units = traded(candidate, space)
    units = units[space.top[units] > 0]
    if not len(units):
        return None
    unit = int(units[rng.integers(len(units))])
    return _moved(candidate, space, unit, int(rng.integers(space.top[unit] + 1)), rng)


def change_family(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """A random layer at a level of other variants, the next one below or above by its bytes."""
    units = np.intersect1d(space.mixed, traded(candidate, space))
    if not len(units):
        return None
    unit = int(units[rng.integers(len(units))])
    own, sources = int(candidate[unit]), [level.source for level in space.units[unit].levels]
    others = sorted(set(sources) - {sources[own]})
    source = others[rng.integers(len(others))]
    below = [index for index in range(own) if sources[index] == source]
    above = [index for index in range(own + 1, len(sources)) if sources[index] == source]
    near = [*below[-1:], *above[:1]]
    return _moved(candidate, space, unit, near[rng.integers(len(near))], rng)


def drop_module(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """Without a random module, whose bytes are spent on random layers; the last module stays."""
    kept = space.modules[candidate[space.modules] > 0]
    if len(kept) < 2:
        return None
    new = candidate.copy()
    new[kept[rng.integers(len(kept))]] = 0
    space.canonical(new)
    return new if _balanced(new, space, traded(new, space), rng) else None


def restore_module(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """With a random module that was dropped."""
    dropped = space.modules[candidate[space.modules] == 0]
    if not len(dropped):
        return None
    new = candidate.copy()
    _restore(new, space, int(dropped[rng.integers(len(dropped))]), traded(candidate, space), rng)
    fits = space.keeps_work(new) and _balanced(new, space, traded(candidate, space), rng)
    return new if fits else None


def exchange_modules(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate | None:
    """With a random dropped module in the place of a random kept one."""
    stays = candidate[space.modules] > 0
    dropped, kept = space.modules[~stays], space.modules[stays]
    if not len(dropped) or not len(kept):
        return None
    comes, goes = int(dropped[rng.integers(len(dropped))]), int(kept[rng.integers(len(kept))])
    alike = space.units[comes].layer == space.units[goes].layer
    new = candidate.copy()
    _restore(new, space, comes, np.flatnonzero(space.holder == goes) if alike else traded(candidate, space), rng)
    new[goes] = 0
    space.canonical(new)
    return new if space.keeps_work(new) and _balanced(new, space, traded(new, space), rng) else None


def _restore(candidate: Candidate, space: Space, module: int, others: Units, rng: np.random.Generator) -> None:
    """Keep a module, in place, its layers at levels of ``others``: each of one of its name if there is any."""
    candidate[module] = 1
    for unit in np.flatnonzero(space.holder == module).tolist():
        named = [other for other in others.tolist() if space.units[other].layer == space.units[unit].layer]
        if models := named or others.tolist():
            other = models[rng.integers(len(models))]
            candidate[unit] = _level_like(space, unit, other, int(candidate[other]))


def _level_like(space: Space, unit: int, other: int, level: int) -> int:
    """Level of a unit that is called as ``level`` of another is, or the nearest to it in bytes for each weight."""
    wanted, levels = space.units[other].levels[level], space.units[unit].levels
    share = wanted.bytes / space.units[other].parameters
    far = [(own.label != wanted.label, abs(own.bytes / space.units[unit].parameters - share)) for own in levels]
    return far.index(min(far))


def _moved(candidate: Candidate, space: Space, unit: int, level: int, rng: np.random.Generator) -> Candidate | None:
    """The candidate with a unit at another level, within the budget; None if that touches too many others."""
    new = candidate.copy()
    new[unit] = level
    rest = traded(new, space)
    balanced = _balanced(new, space, rest[rest != unit], rng)
    return new if balanced and np.count_nonzero(new != candidate) <= MOST_CHANGES else None


def _balanced(candidate: Candidate, space: Space, units: Units, rng: np.random.Generator) -> bool:
    """Lower random ``units`` in place until the budget holds, and raise those that were not while a step fits.

    Who pays and who gains is drawn anew each time: all of them, or half, or a quarter, down to a single one.
    """
    for members in space.members:
        own = rng.permutation(np.intersect1d(members, units))
        some = own[: max(1, len(own) >> int(rng.integers(len(own).bit_length() or 1)))]
        slack = int(space.slacks(candidate)[space.group_of[members[0]]])
        lowered = repair(candidate, space, some, slack, at_random(rng))
        if lowered is None:
            return False
        for gaining in (some, own):
            _fill(candidate, space, np.setdiff1d(gaining, lowered), rng)
    return True


def _fill(candidate: Candidate, space: Space, units: Units, rng: np.random.Generator) -> None:
    """Raise random ones of ``units`` in place while a step fits."""
    for members, slack in zip(space.members, space.slacks(candidate).tolist(), strict=True):
        fill_budget(candidate, space, np.intersect1d(members, units), slack, at_random(rng))
