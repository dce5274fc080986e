"""Depth pruning as a search space: units that are kept or dropped, so many of each kind."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from evopress.artifacts.tables import CONFIGURATION
from evopress.compression.families import DROP, KEEP, MODULES
from evopress.search.space import Candidate, GroupRule, Level, Space, Unit
from evopress.util.errors import ConfigError

WHOLE = "block"
"""Group of units that hold both modules of their blocks."""


def units_from_modules(table: pd.DataFrame, group_rule: GroupRule) -> tuple[Unit, ...]:
    """Units of a table with the MODULES schema, ordered by block; to keep one costs 1.

    Attention and MLP modules are groups of their own, unless ``group_rule`` is ``none``: then one of either kind may
    be kept at the price of one of the other.
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


def make_depth_space(units: Sequence[Unit], target: float, where: str) -> Space:
    """Space in which exactly ``target`` blocks' worth of units are dropped.

    Args:
        units: as `units_from_modules` makes them.
        target: blocks. Of units that are modules, so many of each kind; where the kinds may trade, of both together.
        where: dotted path of the search's settings, for messages.

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
                f"{where}.target: {asked} {what} are to be dropped, but only {count} may be; lower it, or exclude fewer"
            )
    if asked == max(available.values()):
        raise ConfigError(
            f"{where}.target: all {asked} units would be dropped, so there is nothing to choose; lower it"
        )
    return Space(tuple(units), tuple(count - asked for count in available.values()), MODULES)


def module_rows(table: pd.DataFrame, space: Space, candidate: Candidate, variants: str) -> pd.DataFrame:
    """What a candidate does to each module, with the CONFIGURATION schema.

    Args:
        table: MODULES schema.
        space: made of its units.
        candidate: [units].
        variants: name of the variants.
    """
    levels = {unit.name: unit.levels[index] for unit, index in zip(space.units, candidate, strict=True)}
    rows = [
        (
            row.name,
            row.block,
            row.module,
            variants,
            space.family.name,
            levels[str(row.unit)].label,
            levels[str(row.unit)].value,
            levels[str(row.unit)].cost,
            row.parameters,
            row.bytes * levels[str(row.unit)].cost,
        )
        for row in table.itertuples()
    ]
    return pd.DataFrame(rows, columns=CONFIGURATION.names)
