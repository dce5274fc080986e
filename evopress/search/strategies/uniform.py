"""The same level for every unit: the baseline of every comparison."""

import numpy as np

from evopress.search.space import Candidate, Space, Unit
from evopress.util.errors import ConfigError


def uniform_candidate(space: Space, target: float, where: str) -> Candidate:
    """Level ``target`` everywhere; a unit with one level has no choice and keeps it.

    Args:
        space: units and levels.
        target: value of a level, as in 3 bits; of a sparsity, up to the fraction of one weight.
        where: dotted path of the setting, for messages.

    Raises:
        ConfigError: the target is not a level of each unit, or units without a choice leave too little budget for it.
    """
    candidate = np.array([_level_at(unit, target, where) for unit in space.units], dtype=np.int16)
    if space.cost_of(candidate) > space.budget:
        raise ConfigError(
            f"{where}: {target:g} everywhere exceeds the budget, because layers with a single level cost more than "
            f"that; exclude them from the variants, or use the evolution strategy"
        )
    return candidate


def _level_at(unit: Unit, target: float, where: str) -> int:
    values = [level.value for level in unit.levels]
    nearest = min(range(len(values)), key=lambda index: abs(values[index] - target))
    if len(values) == 1 or abs(values[nearest] - target) * unit.parameters < 1:
        return nearest
    below, above = ([value for value in values if (value > target) == over] for over in (False, True))
    offers = " or ".join(f"{value:g}" for value in [*sorted(below)[-1:], *sorted(above)[:1]])
    raise ConfigError(f"{where}: {target:g} is not a level of {unit.name}; the nearest are {offers}")
