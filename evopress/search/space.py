"""The search space: units, their levels, who trades with whom, and the budget.

Nothing here knows what a level means. A level has a cost (an exact integer), and the costs of the chosen levels may
not exceed the budget; bits, remaining weights and bytes differ in their numbers only.

Where modules may be dropped and their layers have levels as well, a module *holds* its layers: to keep it costs what
its layers take at their lowest levels, a higher level of a layer costs what it takes more than that, and the layers of
a module that is dropped are at their lowest level. So costs add up, whatever is dropped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evopress.compression.base import Family, Unit
from evopress.models.modules import module_kind
from evopress.search.target import FileFacts, SizeTarget, size_budgets
from evopress.util.errors import ConfigError

Candidate = NDArray[np.int16]
"""One level index per unit, [units]."""
DENSE_LEVEL = -1
"""In a candidate, a unit as it is in the dense model. Only for measuring: it has no cost, and no result holds it."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds for a token."""

    dense: int
    """Of the dense model."""
    most: int
    """Of a candidate."""


@dataclass(frozen=True)
class Space:
    """Units ordered by block, and the budget of each group (in the order of `groups`)."""

    units: tuple[Unit, ...]
    group_budgets: tuple[int, ...]
    in_bytes: bool = False
    """Whether budgets count the bytes of levels, and not their costs."""
    work: "Work | None" = None
    """The bound on multiply-adds, where the target has one."""

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
        costs = np.array([row + row[-1:] * (width - len(row)) for row in rows], dtype=np.int64)
        for unit in np.flatnonzero(self.holder >= 0):
            costs[self.holder[unit], 1:] += costs[unit, 0]
            costs[unit] -= costs[unit, 0]
        return costs

    @cached_property
    def holder(self) -> NDArray[np.int64]:
        """Unit of modules that each unit of layers leaves with, [units]; -1 where it always stays."""
        holds = {module: number for number, unit in enumerate(self.units) for module in unit.modules}
        own = [None if unit.modules else (unit.block, module_kind(unit.layers[0].layer)) for unit in self.units]
        return np.array([-1 if module is None else holds.get(module, -1) for module in own], dtype=np.int64)

    @cached_property
    def modules(self) -> NDArray[np.int64]:
        """Units of modules, where layers have levels as well; none where only modules, or only layers, do."""
        return np.flatnonzero([bool(unit.modules) for unit in self.units] if self.is_joint else [])

    @cached_property
    def is_joint(self) -> bool:
        """Whether levels are of several variants."""
        return any(level.source for unit in self.units for level in unit.levels)

    @cached_property
    def mixed(self) -> NDArray[np.int64]:
        """Units of layers that have levels of several variants."""
        sources = [0 if unit.modules else len({level.source for level in unit.levels}) for unit in self.units]
        return np.flatnonzero(np.array(sources) > 1)

    @cached_property
    def up(self) -> Candidate:
        """The next higher level of the same variants for each level, [units, most levels]; -1 where there is none."""
        return self._neighbours(higher=True)

    @cached_property
    def down(self) -> Candidate:
        """The next lower level of the same variants, or of any where those have none, [units, most levels]; 0 of 0."""
        below = np.arange(self.costs.shape[1], dtype=np.int16) - 1
        own = self._neighbours(higher=False)
        return np.where(own < 0, below.clip(min=0), own)

    def _neighbours(self, *, higher: bool) -> Candidate:
        """The nearest level of the same variants on one side of each level, [units, most levels]; else -1."""
        found = np.full(self.costs.shape, -1, dtype=np.int16)
        for number, unit in enumerate(self.units):
            sources = [level.source for level in unit.levels]
            for index, source in enumerate(sources):
                others = range(index + 1, len(sources)) if higher else range(index - 1, -1, -1)
                found[number, index] = next((other for other in others if sources[other] == source), -1)
        return found

    def limits(self) -> list[tuple[int, int]]:
        """Least and most that each group can cost; of modules that hold layers, one stays at least."""
        least = [int(self.costs[members, 0].sum()) for members in self.members]
        if len(self.modules):
            first = int(self.costs[self.modules, 1].argmin())
            least[self.group_of[self.modules[first]]] += int(self.costs[self.modules[first], 1])
        return [
            (low, int(self.costs[members].max(axis=1).sum())) for low, members in zip(least, self.members, strict=True)
        ]

    def tradable(self, candidate: Candidate) -> NDArray[np.bool_]:
        """Units that may go a level up or down alone, [units]: no modules, and no layers of dropped ones."""
        trades = (self.holder < 0) | (candidate[self.holder] > 0)
        trades[self.modules] = False
        return trades

    def canonical(self, candidate: Candidate) -> Candidate:
        """The same with the layers of dropped modules at their lowest level, in place."""
        candidate[(self.holder >= 0) & (candidate[self.holder] == 0)] = 0
        return candidate

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

    @cached_property
    def saved(self) -> NDArray[np.int64]:
        """Multiply-adds for a token that each unit saves at its lowest level, [units]; 0 where it is a layer."""
        return np.array([unit.parameters if unit.modules else 0 for unit in self.units], dtype=np.int64)

    def work_of(self, candidate: Candidate) -> int:
        """Multiply-adds for a token of a candidate, where they are bounded."""
        return (self.work.dense if self.work else 0) - int(self.saved[candidate == 0].sum())

    def keeps_work(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps to the bound on multiply-adds, if there is one."""
        return self.work is None or self.work_of(candidate) <= self.work.most

    def fits(self, candidate: Candidate) -> bool:
        """Whether every group keeps to its budget, and the whole to the bound on multiply-adds."""
        return bool((self.slacks(candidate) >= 0).all()) and self.keeps_work(candidate)


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
        space = Space(tuple(units), (), in_bytes=True)
        limits = space.limits() if len(space.modules) else None
        budgets = size_budgets(units, target, file, f"{where}.target", limits)
        return replace(space, group_budgets=budgets, work=_work(space, target, file, f"{where}.target"))
    return Space(tuple(units), family.budgets(units, target, where))


def _work(space: Space, target: SizeTarget, file: FileFacts, where: str) -> Work | None:
    """The bound on multiply-adds that the target names.

    Raises:
        ConfigError: it does not hold even where the least is kept (`budget.keep_one`).
    """
    if target.multiply_adds is None:
        return None
    work = Work(file.multiply_adds, math.floor(Fraction(str(target.multiply_adds)) * file.multiply_adds))
    least = np.zeros(len(space.units), dtype=np.int16)
    least[space.modules[space.costs[space.modules, 1].argmin()]] = 1
    needed = replace(space, work=work).work_of(least)
    if needed > work.most:
        raise ConfigError(
            f"{where}.multiply_adds: {target.multiply_adds:g} of the dense model's is less than what stays when all "
            f"modules but one are dropped; give at least {math.ceil(1e4 * needed / work.dense) / 1e4:g}, or exclude "
            "fewer modules"
        )
    return work
