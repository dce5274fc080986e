"""Starts from what other searches have found: their configurations, as candidates of this search's space."""

import numpy as np
import pandas as pd

from evopress.compression.families import DROP
from evopress.search.evolution.initial import even_candidate
from evopress.search.evolution.mutation import lower_to_budget, spend_slack
from evopress.search.space import Candidate, Space, Unit


def earlier_candidate(space: Space, configuration: pd.DataFrame) -> Candidate:
    """What a configuration (CONFIGURATION schema) comes to in this space, whatever that costs.

    A layer gets its level of nearest value, bits or sparsity, as the other search may have had other levels; where it
    is missing, its even one. A unit of modules is dropped if all of them are.
    """
    values = dict(zip(configuration["unit"], configuration["value"], strict=True))
    dropped = configuration[configuration["level"] == DROP]
    gone = set(zip(dropped["block"], dropped["layer"], strict=True))
    candidate = even_candidate(space)
    for number, unit in enumerate(space.units):
        if unit.modules:
            candidate[number] = 0 if gone.issuperset(unit.modules) else space.top[number]
        elif unit.name in values:
            candidate[number] = _nearest(unit, values[unit.name])
    return candidate


def _nearest(unit: Unit, value: float) -> int:
    return int(np.argmin([abs(level.value - value) for level in unit.levels]))


def within_budget(candidate: Candidate, space: Space, rng: np.random.Generator) -> Candidate:
    """The candidate, with random units lowered in each group that spends too much, and raised in one that can spend."""
    fitting = candidate.copy()
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        lower_to_budget(fitting, space, members, budget - space.cost_of(fitting, members), rng)
        spend_slack(fitting, space, members, budget - space.cost_of(fitting, members), rng)
    return fitting
