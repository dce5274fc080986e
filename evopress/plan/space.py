"""The space of a search from the planned table of its variants, and how much of the model its candidates run."""

from dataclasses import dataclass

import pandas as pd

from evopress.compression.base import GroupRule
from evopress.compression.families import family_of
from evopress.search.problem import SearchProblem
from evopress.search.space import Space, make_space
from evopress.util.errors import ConfigError


@dataclass(frozen=True)
class Kept:
    """Expected shares of the model that a candidate runs; less than 1 where modules are dropped."""

    blocks: float
    """Of blocks that do anything: those that lost both modules are skipped."""
    arithmetic: float
    """Of modules."""


def planned_space(variants: pd.DataFrame, target: float, group_rule: GroupRule, where: str) -> Space:
    """The space of `planned_problem`."""
    return planned_problem(variants, target, group_rule, where).space


def planned_problem(variants: pd.DataFrame, target: float, group_rule: GroupRule, where: str) -> SearchProblem:
    """The problem that a search will have.

    Args:
        variants: as `Method.table` makes it.
        target: of the search.
        group_rule: who may trade levels.
        where: dotted path of the search's settings, for messages.

    Raises:
        ConfigError: the target and the levels do not allow a search.
    """
    if variants.empty:
        raise ConfigError(f"{where}.variants: holds nothing to choose from; exclude fewer")
    family = family_of(variants)
    space = make_space(family, family.units(variants, group_rule), target, where)
    return SearchProblem(space, family, "", where)


def kept_share(space: Space, blocks: int) -> Kept:
    """What a candidate within the budget runs of a model of ``blocks`` blocks, if what it drops is anywhere."""
    modules = [len(unit.modules) for unit in space.units]
    if not any(modules):
        return Kept(1.0, 1.0)
    dropped = (1 - space.budget / len(modules)) * sum(modules) / (2 * blocks)
    alone = max(modules) == 1  # a block is gone only if both its modules happen to be dropped
    return Kept(1 - (dropped**2 if alone else dropped), 1 - dropped)
