"""Brute force over whole blocks: every choice of so many is judged on the same tokens, and the best one is kept."""

import math
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from evopress.search.context import Context, Found
from evopress.search.engine.objectives import Fitness
from evopress.search.enumeration import enumeration
from evopress.search.rounds import search_by_model
from evopress.search.settings import BruteSettings
from evopress.search.space import Space
from evopress.util.errors import ConfigError

PART = 64
"""Candidates that are judged together, and lost if the search is killed."""


def brute(context: Context[BruteSettings]) -> Found | None:
    """Judge every choice of units to drop.

    Raises:
        ConfigError: there are more than ``max_candidates``, or the text or the memory is too little.
        ArtifactError: tokens or variants are missing, damaged or of another model.
        SearchError: no candidate has a fitness.
    """
    settings = context.settings
    candidates = every_choice(context.space, settings.max_candidates, context.where)
    rounds = enumeration(candidates, PART, settings.tokens, settings.seed)
    fitness = Fitness(settings.fitness, settings.top_k)
    return search_by_model(context, rounds, fitness, settings.tokens_asked())


def every_choice(space: Space, most: int, where: str) -> NDArray[np.int16]:
    """Every candidate that meets the budget exactly, [C, units], in an order in which neighbours share their prefixes.

    Args:
        space: one group of units with two levels, all of the same costs.
        most: candidates.
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: there are more.
    """
    require_few(space, most, where)
    candidates = np.ones((choices(space), len(space.units)), dtype=np.int16)
    for row, chosen in enumerate(combinations(range(len(space.units)), dropped_units(space))):
        candidates[row, list(chosen)] = 0
    return candidates


def dropped_units(space: Space) -> int:
    """Units that have to go."""
    return len(space.units) - space.budget // int(space.costs[0, 1])


def choices(space: Space) -> int:
    """Ways to choose them."""
    return math.comb(len(space.units), dropped_units(space))


def require_few(space: Space, most: int, where: str) -> None:
    """Refuse more than ``most`` candidates.

    Raises:
        ConfigError: with their number.
    """
    if choices(space) > most:
        raise ConfigError(
            f"{where}.max_candidates: {dropped_units(space)} of {len(space.units)} can be dropped in "
            f"{choices(space):,} ways, more than {most:,}; raise it, drop fewer, or use the evolution strategy"
        )
