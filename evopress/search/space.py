"""The search space: units, their levels, who trades with whom, and the budget.

Nothing here knows what a level means. A level has a cost (an exact integer), and the costs of the chosen levels may
not exceed the budget; bits, remaining weights and bytes differ in their numbers only.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.compression.base import Family, GroupRule, Level, Unit
from evopress.compression.families import BITS, family_named
from evopress.util.errors import ConfigError

Candidate = NDArray[np.int16]
"""One level index per unit, [units]."""
DENSE_LEVEL = -1
"""In a candidate, a unit as it is in the dense model. Only for measuring: it has no cost, and no result holds it."""


@dataclass(frozen=True)
class Space:
    """Units ordered by block, and the budget of each group (in the order of `groups`)."""

    units: tuple[Unit, ...]
    group_budgets: tuple[int, ...]
    family: Family = BITS
    """What the levels count."""

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
        rows = [[level.cost for level in unit.levels] for unit in self.units]
        return np.array([row + row[-1:] * (width - len(row)) for row in rows], dtype=np.int64)

    @property
    def budget(self) -> int:
        """Most that a candidate may cost."""
        return sum(self.group_budgets)

    def cost_of(self, candidate: Candidate, units: NDArray[np.int64] | None = None) -> int:
        """Cost of a candidate, or of some of its units."""
        chosen = np.arange(len(self.units)) if units is None else units
        return int(self.costs[chosen, candidate[chosen]].sum())

    def fits(self, candidate: Candidate) -> bool:
        """Whether every group keeps to its budget."""
        return all(
            self.cost_of(candidate, members) <= budget
            for members, budget in zip(self.members, self.group_budgets, strict=True)
        )


def units_from_variants(table: pd.DataFrame, group_rule: GroupRule) -> tuple[Unit, ...]:
    """Units of a table with the VARIANTS schema: one per linear layer, ordered by block.

    Args:
        table: the variants of every block.
        group_rule: who may trade: layers of the same ``size``, of the same ``name`` (q_proj), or all (``none``).
    """
    by_layer: dict[str, list[dict[Any, Any]]] = {}
    for record in table.sort_values("cost", kind="stable").to_dict("records"):  # once: frames are slow by the row
        by_layer.setdefault(record["name"], []).append(record)
    units = []
    for name in table["name"].unique():
        records = by_layer[name]
        levels = (
            Level(r["level"], float(r["value"]), int(r["cost"]), int(r["bytes"]), float(r.get("error", math.nan)))
            for r in records
        )
        first, parameters = records[0], int(records[0]["parameters"])
        group = {"size": str(parameters), "name": first["layer"].rsplit(".", 1)[-1], "none": "all"}[group_rule]
        units.append(Unit(first["name"], int(first["block"]), first["layer"], group, parameters, tuple(levels)))
    return tuple(sorted(units, key=lambda unit: unit.block))


def make_space(units: Sequence[Unit], target: float, where: str, measure: str = "bits") -> Space:
    """Set the budget: costs sum to at most what the target allows (`budget_for`), shared out among the groups.

    Args:
        units: what is searched, ordered by block.
        target: average bits (at most) or sparsity (at least); need not be a level.
        where: dotted path of the search's settings, for messages.
        measure: name of the family: what ``target`` counts.

    Raises:
        ConfigError: there is nothing to search, or no choice of levels can meet the target.
    """
    if not units:
        raise ConfigError(f"{where}.variants: holds no layer; exclude fewer")
    check_target(units, target, f"{where}.target", measure)
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.group, []).append(unit)
    budget = budget_for(target, sum(unit.parameters for unit in units), measure)
    wanted = [budget_for(target, sum(unit.parameters for unit in group), measure) for group in groups.values()]
    limits = [_cost_limits(group) for group in groups.values()]
    return Space(tuple(units), _share_out(budget, wanted, limits), family_named(measure))


def budget_for(target: float, parameters: int, measure: str = "bits") -> int:
    """Most bits, or most weights kept, that meet the target: exact, with the target as it was written in decimal."""
    exact = Fraction(str(target))
    return math.floor((exact if measure == "bits" else 1 - exact) * parameters)


def check_target(units: Sequence[Unit], target: float, where: str, measure: str) -> None:
    """Refuse a target that lies outside of what the levels allow.

    Raises:
        ConfigError: with the limit that is passed.
    """
    parameters = sum(unit.parameters for unit in units)
    budget = budget_for(target, parameters, measure)
    lowest, highest = _cost_limits(units)
    cheap, dear = (("below", "lowest"), ("above", "highest"))
    if measure == "sparsity":
        cheap, dear = dear, cheap
    if budget < lowest:
        side, end = cheap
        bound = _describe([unit.levels[0] for unit in units], family_named(measure).average(lowest, parameters), end)
        raise ConfigError(f"{where}: {target:g} {measure} is {side} the {bound}")
    if budget > highest:
        side, end = dear
        bound = _describe([unit.levels[-1] for unit in units], family_named(measure).average(highest, parameters), end)
        raise ConfigError(f"{where}: {target:g} {measure} is {side} the {bound}")


def _describe(levels: Iterable[Level], average: float, which: str) -> str:
    values = {level.value for level in levels}
    if len(values) == 1:
        return f"{which} level ({values.pop():g})"
    return f"{which} average that the levels of these layers allow ({average:.4g})"


def _cost_limits(units: Iterable[Unit]) -> tuple[int, int]:
    ends = [(unit.levels[0].cost, unit.levels[-1].cost) for unit in units]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


def _share_out(budget: int, wanted: Sequence[int], limits: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Give each group what it wants, within its limits; the others bear the difference in proportion to their room.

    Groups with fixed units may be unable to spend (or to save) what their size would have them; the sum of the shares
    never exceeds ``budget``.
    """
    shares = [min(max(want, low), high) for want, (low, high) in zip(wanted, limits, strict=True)]
    missing = budget - sum(shares)
    edges = [low if missing < 0 else high for low, high in limits]
    room = [edge - share for edge, share in zip(edges, shares, strict=True)]
    total = sum(room)
    if not total:
        return tuple(shares)
    # Floor division rounds towards less cost, for either sign, and never past an edge: |missing| <= |total|.
    return tuple(share + missing * part // total for share, part in zip(shares, room, strict=True))
