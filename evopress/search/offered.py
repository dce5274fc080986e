"""What is offered to a search: which levels of each layer, and which layers share one.

Runtimes fuse layers that read the same input, such as q, k and v, into one matrix, which has one level. Layers that are
*tied* are one unit, whose levels cost and weigh what those of its layers do together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evopress.compression.base import GroupRule, Level, Unit
from evopress.compression.families import group_name
from evopress.search.target import FileFacts, SizeTarget
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

Ties = tuple[tuple[str, ...], ...]
"""Layers that share a level wherever they are in the same module: the last parts of their names."""


FactsOf = Callable[[Sequence[Unit]], FileFacts]
"""What is known of a file, from the layers that are searched."""


@dataclass(frozen=True)
class Constraints:
    """What a search asks of the levels that it picks from."""

    where: str
    """Dotted path of the search's settings, for messages."""
    target: float | SizeTarget | None = None
    """Its budget; None is any cost."""
    group_rule: GroupRule = "none"
    """Who may trade levels."""
    tied: Ties = ()
    """Layers that share a level."""
    levels: Sequence[str] | None = None
    """Labels of those that are offered; None is all."""
    file: FactsOf | None = None
    """Gives what is known of the file of which the target is the size."""


def merged(ties: Ties) -> Ties:
    """The same ties with those joined that name a layer in common; each group in alphabetical order."""
    groups: list[set[str]] = []
    for tie in ties:
        joined = {*tie}.union(*(group for group in groups if group & {*tie}))
        groups = [group for group in groups if not group & joined] + [joined]
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def only_levels(table: "pd.DataFrame", labels: Sequence[str] | None, where: str) -> "pd.DataFrame":
    """Rows of a table of variants whose level is one of ``labels``; None is all.

    Args:
        table: columns `name` and `level`, one row for each level of each layer.
        labels: of the levels that are offered.
        where: dotted path of the search's settings, for messages.

    Raises:
        ConfigError: a layer is left without a level.
    """
    if labels is None:
        return table
    left = table[table["level"].isin(labels)]
    known = set(left["name"])
    if without := [name for name in table["name"].unique() if name not in known]:
        made = ", ".join(map(str, table[table["name"] == without[0]]["level"]))
        raise ConfigError(
            f"{where}.levels: {without[0]} has the levels {made}, and none of {', '.join(labels)}, which are all that "
            "this search or its exports allow; make variants at these, or exclude the layer"
        )
    return left


def tied_units(units: Sequence[Unit], ties: Ties, group_rule: GroupRule, where: str) -> tuple[Unit, ...]:
    """Units in which tied layers are one, in the place of the first of them.

    Args:
        units: one for each layer, ordered by block.
        ties: which share a level.
        group_rule: who may trade levels.
        where: dotted path of the search's settings, for messages.

    Raises:
        ConfigError: tied layers have no level in common.
    """
    number = {kind: index for index, tie in enumerate(ties) for kind in tie}
    together: dict[tuple[str, int | str], list[Unit]] = {}
    for unit in units:
        module, _, kind = unit.name.rpartition(".")
        together.setdefault((module, number.get(kind, kind)), []).append(unit)
    return tuple(
        members[0] if len(members) == 1 else _as_one(members, group_rule, where) for members in together.values()
    )


def _as_one(units: Sequence[Unit], group_rule: GroupRule, where: str) -> Unit:
    labels = [{level.label for level in unit.levels} for unit in units]
    common = set.intersection(*labels)
    if not common:
        raise ConfigError(
            f"{where}.tied: {' and '.join(unit.name for unit in units)} share a level, but have none in common; "
            "exclude them, or make variants at the same levels"
        )
    aligned = [[level for level in unit.levels if level.label in common] for unit in units]
    by_label = [{level.label: level for level in levels} for levels in aligned]
    weights = [unit.parameters for unit in units]
    joint = [_joint([known[level.label] for known in by_label], weights) for level in aligned[0]]
    joint.sort(key=lambda level: level.bytes if level.source else level.cost)
    members = tuple(
        replace(unit, levels=tuple(known[level.label] for level in joint))
        for unit, known in zip(units, by_label, strict=True)
    )
    first, kinds = units[0], [unit.layer.rpartition(".")[2] for unit in units]
    return Unit(
        name=first.name.rpartition(".")[0] + "." + "+".join(kinds),
        block=first.block,
        layer=first.layer,
        group=group_name(group_rule, "+".join(kinds), sum(weights)),
        parameters=sum(weights),
        levels=tuple(joint),
        members=members,
    )


def _joint(levels: Sequence[Level], weights: Sequence[int]) -> Level:
    """One level of several layers: costs, bytes and errors are sums, the value is the mean over their weights."""
    values = {level.value for level in levels}
    mean = math.fsum(level.value * weight for level, weight in zip(levels, weights, strict=True)) / sum(weights)
    return Level(
        label=levels[0].label,
        value=values.pop() if len(values) == 1 else mean,
        cost=sum(level.cost for level in levels),
        bytes=sum(level.bytes for level in levels),
        error=math.fsum(level.error for level in levels),
        source=levels[0].source,
    )
