"""The families: bit-widths, sparsities (of weights as they are, or rounded), and modules that are kept or dropped.

Costs are exact integers, and the costs of the chosen levels may not exceed the budget of their group. Every table of
variants and every configuration records the family of its levels, by name.
"""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

from evopress.compression.base import Family, GroupRule, Level, Unit
from evopress.models.modules import ATTENTION, KINDS, MLP, module_kind
from evopress.util.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import pandas as pd

KEEP, DROP = "keep", "drop"
"""Labels of the two levels of a module."""
WHOLE = "block"
"""Group of units that hold both modules of their blocks."""


def level_map_caption(bright: str) -> str:
    """Caption of a map of layers whose levels are the brighter the more they ``bright``."""
    return (
        "Level of every layer: one column a block, from the input on the left to the output on the right; input "
        "embedding and head, where they have levels, are one cell each, above and below. "
        f"Bright layers {bright}, dark layers fewer. Colours mean the same in all searches of this kind."
    )


def group_name(rule: GroupRule, kind: str, parameters: int) -> str:
    """Group of a unit of linear layers: units of one group trade levels.

    Args:
        rule: what the units of a group have in common.
        kind: last part of the layer's name, as in `q_proj`.
        parameters: weights of the unit.
    """
    return {"size": str(parameters), "name": kind, "none": "all"}[rule]


class LayerFamily(Family):
    """Levels of linear layers, with a budget in proportion to their weights."""

    introduction = (
        "The linear layers listed below each have a level of compression; the rest is as in the original. The levels "
        "are "
    )
    size = "packed size of the whole model"
    below: ClassVar[tuple[str, str]] = ("below", "lowest")
    """Words for a target that would cost less than the cheapest levels."""
    above: ClassVar[tuple[str, str]] = ("above", "highest")
    unit: ClassVar[str]
    """What follows an average in a sentence, as in `bits per weight`."""
    column: ClassVar[tuple[str, str, int]]
    """Title, subtitle and decimals of the average's column in the comparison of models."""
    overhead: ClassVar[str]
    """What is stored beside the numbers that levels count, as in `scales and zeros`."""
    labels: ClassVar[str]
    """What the labels of levels mean, for the model card."""
    storage: ClassVar[str]
    """How the folder of a compressed model holds the weights and what that means for who runs it, for the card."""

    @abstractmethod
    def budget(self, target: float, parameters: int) -> int:
        """Most that so many weights may cost to meet the target: exact, with the target as written in decimal."""

    @abstractmethod
    def title(self, average: float) -> str:
        """What a model is called that has this average, as in `at 3 bits per weight`."""

    @abstractmethod
    def bits(self, cost: int, parameters: int, dense_bytes: int) -> float:
        """Bits per weight, without overhead, of layers with this total cost that take ``dense_bytes`` uncompressed."""

    def units(self, table: "pd.DataFrame", group_rule: GroupRule) -> tuple[Unit, ...]:
        """Units of a table with the VARIANTS schema: one per linear layer, ordered by block."""
        by_layer: dict[str, list[dict[Any, Any]]] = {}
        for record in sorted(table.to_dict("records"), key=_by_cost):  # once: frames are slow by the row
            by_layer.setdefault(record["name"], []).append(record)
        units = []
        for name in table["name"].unique():
            records = by_layer[name]
            levels = (
                Level(r["level"], float(r["value"]), int(r["cost"]), int(r["bytes"]), float(r.get("error", math.nan)))
                for r in records
            )
            first, parameters = records[0], int(records[0]["parameters"])
            group = group_name(group_rule, first["layer"].rsplit(".", 1)[-1], parameters)
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
        return share_out(min(self.budget(target, _parameters(units)), _cost_limits(units)[1]), wanted, limits)

    def describe(self, units: Sequence[Unit], levels: Sequence[int]) -> str:
        """Number of layers and their average."""
        layers = sum(len(unit.layers) for unit in units)
        cost = sum(unit.levels[level].cost for unit, level in zip(units, levels, strict=True))
        return f"{layers} layers, {self.average(cost, _parameters(units)):.6g} {self.unit} on average"

    def excess(self, cost: int, units: Sequence[Unit], target: float) -> str:
        """As an average."""
        return f"{cost / _parameters(units):.3g} {self.unit} above the target of {target:g} ({cost} in all)"

    def reached(self, rows: "pd.DataFrame") -> str:
        """The average."""
        average = self.average(int(rows["cost"].sum()), int(rows["parameters"].sum()))
        return f"asked, {average:.4f} reached"

    def _check_target(self, units: Sequence[Unit], target: float, where: str) -> None:
        """Refuse a target outside of what the levels allow, with the limit that is passed."""
        budget = self.budget(target, _parameters(units))
        lowest, highest = _cost_limits(units)
        if budget < lowest:
            (side, end), index, limit = self.below, 0, lowest
        elif budget - highest >= len(units):  # each highest level costs less than one below what it stands for
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
    asked = unit = "bits per weight"
    column = ("bits", "per weight", 2)
    overhead = "scales and zeros"
    labels = "a number is bits per weight, without scales; a name is a type of GGUF, which has its scales in its bits"
    storage = (
        "The weights are stored dequantized, in the type of the original, so the folder loads like the original, with "
        "`AutoModelForCausalLM.from_pretrained`, needs no special kernels, and takes as much memory as the original."
    )
    level_map = level_map_caption("keep more bits")

    def budget(self, target: float, parameters: int) -> int:
        """Most bits."""
        return math.floor(Fraction(str(target)) * parameters)

    def average(self, cost: int, parameters: int) -> float:
        """Bits per weight, without scales and zero points."""
        return cost / parameters

    def title(self, average: float) -> str:
        """To four digits."""
        return f"at {average:.4g} bits per weight"

    def bits(self, cost: int, parameters: int, dense_bytes: int) -> float:
        """The average."""
        return cost / parameters

    def excess(self, cost: int, units: Sequence[Unit], target: float) -> str:
        """In bits."""
        share = cost / _parameters(units)
        return f"{share:.3g} bits per weight above the target of {target:g} ({cost} bits in all)"


class Sparsity(LayerFamily):
    """Average sparsity, at least; a level costs the weights that it keeps."""

    name = "sparsity"
    asked = "sparsity"
    unit = "of the weights zero"
    column = ("sparsity", "of searched layers", 4)
    overhead = "the bitmask"
    labels = "signed steps of equally many weights from the target sparsity, or n of every m weights kept"
    storage = (
        "The removed weights are stored as zeros, so the folder loads like the original, with "
        "`AutoModelForCausalLM.from_pretrained`, and takes as much memory and time as the original: no mainstream "
        "runtime gains speed from zeros in arbitrary places today. (Patterns such as 2:4 can be used by some GPUs, "
        "once a runtime has converted the weights.)"
    )
    level_map = level_map_caption("lose more weights")
    below = ("above", "highest")
    above = ("below", "lowest")

    def budget(self, target: float, parameters: int) -> int:
        """Most weights that are kept."""
        return math.floor((1 - Fraction(str(target))) * parameters)

    def average(self, cost: int, parameters: int) -> float:
        """Share of the weights that are zero."""
        return 1 - cost / parameters

    def title(self, average: float) -> str:
        """In per cent."""
        return f"at {average:.1%} sparsity"

    def bits(self, cost: int, parameters: int, dense_bytes: int) -> float:
        """Those of the weights that are kept, in the type of the original."""
        return (1 - self.average(cost, parameters)) * 8 * dense_bytes / parameters

    def excess(self, cost: int, units: Sequence[Unit], target: float) -> str:
        """In weights."""
        share = cost / _parameters(units)
        return f"{share:.3g} short of the target of {target:g} ({cost} weights too many stay)"


class RoundedSparsity(Sparsity):
    """The same where the weights that are kept are integers of so many bits: a family for each bit-width."""

    overhead = "bitmask, scales and zeros"

    def __init__(self, bits: int) -> None:
        """Of weights of ``bits`` bits."""
        self.kept_bits = bits
        self.name = f"sparsity-int{bits}"

    def title(self, average: float) -> str:
        """With the bit-width of what is kept."""
        return f"{super().title(average)} and {self.kept_bits} bits"

    def bits(self, cost: int, parameters: int, dense_bytes: int) -> float:
        """Those of the weights that are kept."""
        return self.kept_bits * cost / parameters


class Mixed(LayerFamily):
    """Levels of layers of several families, which have bytes in common and nothing else: a level costs its bytes.

    No table records it: each level has the family of its own variants.
    """

    name = "mixed"
    asked = unit = "stored bits per weight"
    column = ("stored bits", "per weight", 2)
    overhead = "scales, zeros and bitmasks"
    labels = "its variants, and its label among them"
    storage = (
        "The weights are stored dequantized, those that were removed as zeros, in the type of the original, so the "
        "folder loads like the original, with `AutoModelForCausalLM.from_pretrained`, and takes as much memory as the "
        "original."
    )
    level_map = level_map_caption("take more bytes for a weight")

    def budget(self, target: float, parameters: int) -> int:
        """Most bytes."""
        return math.floor(Fraction(str(target)) * parameters / 8)

    def average(self, cost: int, parameters: int) -> float:
        """Stored bits per weight."""
        return 8 * cost / parameters

    def title(self, average: float) -> str:
        """To four digits."""
        return f"at {average:.4g} stored bits per weight"

    def bits(self, cost: int, parameters: int, dense_bytes: int) -> float:
        """The average."""
        return self.average(cost, parameters)

    def reached(self, rows: "pd.DataFrame") -> str:
        """The average."""
        return f"asked, {self.average(int(rows['bytes'].sum()), int(rows['parameters'].sum())):.4f} reached"

    def describe(self, units: Sequence[Unit], levels: Sequence[int]) -> str:
        """How many layers have levels of each variants, and how many modules go."""
        dropped = {module for unit, level in zip(units, levels, strict=True) if not level for module in unit.modules}
        modules = sum(len(unit.modules) for unit in units)
        sources = Counter(
            layer.levels[level].source
            for unit, level in zip(units, levels, strict=True)
            if not unit.modules
            for layer in unit.layers
            if (layer.block, module_kind(layer.layer)) not in dropped
        )
        words = [f"{count} layers of {source}" for source, count in sources.items()]
        return ", ".join([*words, *([f"{len(dropped)} of {modules} modules dropped"] if modules else [])])


class Modules(Family):
    """Attention and MLP modules that are kept or dropped; exactly so many blocks' worth of them go."""

    name = "modules"
    takes_modules = True
    asked = "blocks' worth of modules"
    introduction = "Everything but its dropped modules is as in the original. They were "
    size = "size of the parameters in use"
    level_map = (
        "Modules that are dropped (bright) and kept (dark): one column a block, from the input on the left to the "
        "output on the right."
    )

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
        """How many modules of each kind go, and how many blocks lose both."""
        dropped = [
            module
            for unit, level in zip(units, levels, strict=True)
            if unit.levels[level].label == DROP
            for module in unit.modules
        ]
        kinds = Counter(kind for _, kind in dropped)
        whole = sum(count == len(KINDS) for count in Counter(block for block, _ in dropped).values())
        return f"{kinds[ATTENTION]} attention and {kinds[MLP]} MLP modules dropped, {whole} blocks whole"

    def excess(self, cost: int, units: Sequence[Unit], target: float) -> str:
        """In modules."""
        return f"{cost * len(units[0].modules)} modules too many stay for the target of {target:g} blocks"

    def reached(self, rows: "pd.DataFrame") -> str:
        """How many modules of each kind go."""
        dropped = rows[rows["level"] == DROP]["layer"]
        counts = " and ".join(f"{(dropped == kind).sum()} {kind}" for kind in KINDS)
        return f"asked to drop, {counts} modules dropped"


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


def _by_cost(record: dict[Any, Any]) -> tuple[int, float]:
    """By rising cost; of equal ones (types of one size), the one with less error is later: raising betters a layer."""
    error = float(record.get("error", 0.0))
    return int(record["cost"]), 0.0 if math.isnan(error) else -error


def _parameters(units: Iterable[Unit]) -> int:
    return sum(unit.parameters for unit in units)


def _cost_limits(units: Iterable[Unit]) -> tuple[int, int]:
    ends = [(unit.levels[0].cost, unit.levels[-1].cost) for unit in units]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


BITS, SPARSITY, MODULES, MIXED = Bits(), Sparsity(), Modules(), Mixed()
ROUNDED_SPARSITY = {bits: RoundedSparsity(bits) for bits in range(2, 9)}
"""By the bits of a weight that is kept."""

FAMILIES: list[Family] = [BITS, SPARSITY, MODULES, *ROUNDED_SPARSITY.values()]
"""By the name that tables record."""


def family_named(name: str) -> Family:
    """The family that a table records.

    Raises:
        ArtifactError: there is none of this name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ArtifactError(f"unknown family of levels {name!r} (there are: {known}); was it written by a newer version?")


def family_of(table: "pd.DataFrame") -> Family:
    """The family of a table's levels (column family): where modules are dropped as well, that of the layers.

    Layers at levels of several families are of `MIXED`.

    Raises:
        ArtifactError: the table is empty, or has levels of an unknown family.
    """
    families = [family_named(name) for name in dict.fromkeys(table["family"])]
    if not families:
        raise ArtifactError("levels of no family, where one is expected; delete the table and run again")
    of_layers = [family for family in families if not family.takes_modules]
    return MIXED if len(of_layers) > 1 else (of_layers or families)[0]


def of_modules(table: "pd.DataFrame") -> "pd.Series[bool]":
    """Which rows of a table (column family) take modules out of the model; the others are of linear layers.

    Raises:
        ArtifactError: a row has an unknown family.
    """
    taking = {name: family_named(name).takes_modules for name in table["family"].unique()}
    return table["family"].map(taking).astype(bool)
