"""The search space: units, their levels, who trades with whom, and the budget.

Nothing here knows what a level means. A level has a cost (an exact integer), and the costs of the chosen levels may
not exceed the budget; bits, remaining weights and bytes differ in their numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evopress.compression.base import Family, Unit
from evopress.search.target import FileFacts, SizeTarget, size_budgets

Candidate = NDArray[np.int16]
"""One level index per unit, [units]."""
DENSE_LEVEL = -1
"""In a candidate, a unit as it is in the dense model. Only for measuring: it has no cost, and no result holds it."""


@dataclass(frozen=True)
class Space:
    """Units ordered by block, and the budget of each group (in the order of `groups`)."""

    units: tuple[Unit, ...]
    group_budgets: tuple[int, ...]
    in_bytes: bool = False
    """Whether budgets count the bytes of levels, and not their costs."""

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in order of first appearance."""
        return tuple(dict.fromkeys(unit.group for unit in self.units))

    @cached_property
    def group_of(self) -> NDArray[np.int64]:
        """Group number of each unit, [units]."""
        number = {group: index for index, group in enumerate(self.groups)}
        return np.array([number[unit.group] for unit in self.units])

    @cached_property
    def members(self) -> tuple[NDArray[np.int64], ...]:
        """Unit numbers of each group."""
        return tuple(np.flatnonzero(self.group_of == group) for group in range(len(self.groups)))

    @cached_property
    def top(self) -> Candidate:
        """Highest level of each unit, [units]."""
        return np.array([len(unit.levels) - 1 for unit in self.units], dtype=np.int16)

    @cached_property
    def costs(self) -> NDArray[np.int64]:
        """Cost of each level, [units, most levels]; rows with fewer levels repeat their last."""
        width = int(self.top.max()) + 1
        rows = [[level.bytes if self.in_bytes else level.cost for level in unit.levels] for unit in self.units]
        return np.array([row + row[-1:] * (width - len(row)) for row in rows], dtype=np.int64)

    @property
    def budget(self) -> int:
        """Most that a candidate may cost."""
        return sum(self.group_budgets)

    def cost_of(self, candidate: Candidate, units: NDArray[np.int64] | None = None) -> int:
        """Cost of a candidate, or of some of its units."""
        chosen = np.arange(len(self.units)) if units is None else units
        return int(self.costs[chosen, candidate[chosen]].sum())

    def slacks(self, candidate: Candidate) -> NDArray[np.int64]:
        """What each group may still spend, [groups]; negative where it exceeds its budget."""
        spent = [self.cost_of(candidate, members) for members in self.members]
        return np.array(self.group_budgets, dtype=np.int64) - np.array(spent, dtype=np.int64)

    def fits(self, candidate: Candidate) -> bool:
        """Whether every group keeps to its budget."""
        return bool((self.slacks(candidate) >= 0).all())


def make_space(
    family: Family, units: Sequence[Unit], target: float | SizeTarget, where: str, file: FileFacts | None = None
) -> Space:
    """Space whose budgets are what the target allows.

    Args:
        family: of the variants.
        units: what is searched, ordered by block.
        target: as the user wrote it; need not be a level.
        where: dotted path of the search's settings, for messages.
        file: where the target is the size of a file.

    Raises:
        ConfigError: there is nothing to search, or no choice of levels can meet the target.
    """
    if isinstance(target, SizeTarget):
        assert file is not None
        return Space(tuple(units), size_budgets(units, target, file, f"{where}.target"), in_bytes=True)
    return Space(tuple(units), family.budgets(units, target, where))
