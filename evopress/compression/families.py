"""The families: bit-widths, sparsities, and modules that are kept or dropped.

Costs are exact integers, and the costs of the chosen levels may not exceed the budget of their group.
"""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from evopress.compression.base import Family, GroupRule, Level, Unit
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

KEEP, DROP = "keep", "drop"
"""Labels of the two levels of a module."""
WHOLE = "block"
"""Group of units that hold both modules of their blocks."""


class LayerFamily(Family):
    """Levels of linear layers, with a budget in proportion to their weights."""

    below: tuple[str, str] = ("below", "lowest")
    """Words for a target that would cost less than the cheapest levels."""
    above: tuple[str, str] = ("above", "highest")

    @abstractmethod
    def budget(self, target: float, parameters: int) -> int:
        """Most that so many weights may cost to meet the target: exact, with the target as written in decimal."""

    def units(self, table: "pd.DataFrame", group_rule: GroupRule) -> tuple[Unit, ...]:
        """Units of a table with the VARIANTS schema: one per linear layer, ordered by block."""
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

    def budgets(self, units: Sequence[Unit], target: float, where: str) -> tuple[int, ...]:
        """The budget of all units, shared out among the groups."""
        if not units:
            raise ConfigError(f"{where}.variants: holds no layer; exclude fewer")
        self._check_target(units, target, f"{where}.target")
        groups: dict[str, list[Unit]] = {}
        for unit in units:
            groups.setdefault(unit.group, []).append(unit)
        wanted = [self.budget(target, _parameters(group)) for group in groups.values()]
        limits = [_cost_limits(group) for group in groups.values()]
        return share_out(self.budget(target, _parameters(units)), wanted, limits)

    def describe(self, units: Sequence[Unit], levels: Sequence[int]) -> str:
        """Number of units and their average."""
        cost = sum(unit.levels[level].cost for unit, level in zip(units, levels, strict=True))
        return f"{len(units)} units, {self.name} {self.average(cost, _parameters(units)):.4f} on average"

    def _check_target(self, units: Sequence[Unit], target: float, where: str) -> None:
        """Refuse a target outside of what the levels allow, with the limit that is passed."""
        budget = self.budget(target, _parameters(units))
        lowest, highest = _cost_limits(units)
        if budget < lowest:
            (side, end), index, limit = self.below, 0, lowest
        elif budget > highest:
            (side, end), index, limit = self.above, -1, highest
        else:
            return
        values = {unit.levels[index].value for unit in units}
        bound = (
            f"{end} level ({values.pop():g})"
            if len(values) == 1
            else f"{end} average that the levels of these layers allow ({self.average(limit, _parameters(units)):.4g})"
        )
        raise ConfigError(f"{where}: {target:g} {self.name} is {side} the {bound}")


class Bits(LayerFamily):
    """Average bits per weight, at most; a level costs its bits times the weights."""

    name = "bits"

    def budget(self, target: float, parameters: int) -> int:
        """Most bits."""
        return math.floor(Fraction(str(target)) * parameters)

    def average(self, cost: int, parameters: int) -> float:
        """Bits per weight, without scales and zero points."""
        return cost / parameters


class Sparsity(LayerFamily):
    """Average sparsity, at least; a level costs the weights that it keeps."""

    name = "sparsity"
    below = ("above", "highest")
    above = ("below", "lowest")

    def budget(self, target: float, parameters: int) -> int:
        """Most weights that are kept."""
        return math.floor((1 - Fraction(str(target))) * parameters)

    def average(self, cost: int, parameters: int) -> float:
        """Share of the weights that are zero."""
        return 1 - cost / parameters


class Modules(Family):
    """Attention and MLP modules that are kept or dropped; exactly so many blocks' worth of them go."""

    name = "modules"

    def units(self, table: "pd.DataFrame", group_rule: GroupRule) -> tuple[Unit, ...]:
        """Units of a table with the MODULES schema, ordered by block; to keep one costs 1.

        Attention and MLP modules are groups of their own, unless ``group_rule`` is ``none``: then one of either kind
        may be kept at the price of one of the other.
        """
        units = []
        for name, rows in table.groupby("unit", sort=False):
            modules = tuple(zip(rows["block"].astype(int).tolist(), rows["module"].astype(str).tolist(), strict=True))
            kinds = list(dict.fromkeys(kind for _, kind in modules))
            group = "all" if group_rule == "none" else kinds[0] if len(kinds) == 1 else WHOLE
            levels = (Level(DROP, 1.0, 0, 0), Level(KEEP, 0.0, 1, int(rows["bytes"].sum())))
            layer = kinds[0] if len(modules) == 1 else WHOLE
            units.append(Unit(str(name), modules[0][0], layer, group, int(rows["parameters"].sum()), levels, modules))
        return tuple(sorted(units, key=lambda unit: unit.block))

    def budgets(self, units: Sequence[Unit], target: float, where: str) -> tuple[int, ...]:
        """Units that are kept. Of units that are modules, so many of each kind go; where kinds trade, of both together.

        Raises:
            ConfigError: there is nothing to drop, fewer than asked, or nothing is left to choose.
        """
        if not units:
            raise ConfigError(f"{where}.variants: no module may be dropped; exclude fewer")
        available = Counter(unit.group for unit in units)
        kinds_of_modules = {unit.layer for unit in units if len(unit.modules) == 1}
        share = len(kinds_of_modules) if "all" in available and kinds_of_modules else 1
        asked = round(target) * share // max(len(unit.blocks) for unit in units)
        for group, count in available.items():
            if asked > count:
                what = {"all": "units", WHOLE: "units of blocks"}.get(group, f"{group} modules")
                raise ConfigError(
                    f"{where}.target: {asked} {what} are to be dropped, but only {count} may be; lower it, or exclude "
                    "fewer"
                )
        if asked == max(available.values()):
            raise ConfigError(
                f"{where}.target: all {asked} units would be dropped, so there is nothing to choose; lower it"
            )
        return tuple(count - asked for count in available.values())

    def average(self, cost: int, parameters: int) -> float:
        """Units that are kept."""
        return cost

    def describe(self, units: Sequence[Unit], levels: Sequence[int]) -> str:
        """How many modules go."""
        total = sum(len(unit.modules) for unit in units)
        dropped = sum(len(unit.modules) for unit, level in zip(units, levels, strict=True) if not level)
        return f"{dropped} of {total} modules dropped"


def share_out(budget: int, wanted: Sequence[int], limits: Sequence[tuple[int, int]]) -> tuple[int, ...]:
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


def _parameters(units: Iterable[Unit]) -> int:
    return sum(unit.parameters for unit in units)


def _cost_limits(units: Iterable[Unit]) -> tuple[int, int]:
    ends = [(unit.levels[0].cost, unit.levels[-1].cost) for unit in units]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


BITS, SPARSITY, MODULES = Bits(), Sparsity(), Modules()
