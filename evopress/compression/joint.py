"""Levels of several variants in one search: their names, their units, and where their weights lie.

A level of a layer is named by its variants and its label among them, as in `gptq 4`: labels of two methods, or of two
settings of one, may be the same. Where only one of the variants is of layers, the label alone will do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
from torch import Tensor

from evopress.compression.base import GroupRule, Level, Unit
from evopress.compression.families import MODULES, family_of
from evopress.compression.store import VariantStore
from evopress.models.modules import module_kind
from evopress.util.errors import ConfigError

_BETWEEN = " "
"""Stands between the name of variants, which holds no blank, and a label."""


def own_label(level: Level) -> str:
    """Label of a level among those of its variants."""
    return level.label.removeprefix(f"{level.source}{_BETWEEN}")


def joint_units(tables: Mapping[str, pd.DataFrame], group_rule: GroupRule) -> tuple[Unit, ...]:
    """Units of linear layers, each with its levels of all variants by rising bytes, ordered by block.

    Args:
        tables: of variants (VARIANTS schema), by their name.
        group_rule: who may trade levels.
    """
    found: dict[str, Unit] = {}
    for source, table in tables.items():
        prefix = f"{source}{_BETWEEN}" if len(tables) > 1 else ""
        for unit in family_of(table).units(table, group_rule):
            own = [replace(level, label=f"{prefix}{level.label}", source=source) for level in unit.levels]
            before = found[unit.name].levels if unit.name in found else ()
            levels = sorted([*before, *own], key=lambda level: level.bytes)
            found[unit.name] = replace(unit, levels=tuple(levels))
    return tuple(sorted(found.values(), key=lambda unit: unit.block))


def module_units(source: str, table: pd.DataFrame, layers: Sequence[Unit], where: str) -> tuple[Unit, ...]:
    """Units of modules that are kept or dropped with their layers, ordered by block.

    To keep one takes the bytes of its weights that have no levels; those of its layers come on top.

    Args:
        source: name of the variants.
        table: of modules, MODULES schema.
        layers: linear layers that have levels, whose names tell what module they lie in.
        where: dotted path of the search's settings, for messages.

    Raises:
        ConfigError: modules and layers are not of the same blocks.
    """
    blocks = {layer.block: layer.name.removesuffix(f".{layer.layer}") for layer in layers}
    searched: dict[tuple[int, str], int] = {}
    for layer in layers:
        module = layer.block, module_kind(layer.layer)
        searched[module] = searched.get(module, 0) + layer.parameters
    dense: dict[tuple[int, str], int] = {}
    for row in table.to_dict("records"):
        module, block = (int(row["block"]), str(row["module"])), str(row["name"]).rpartition(".")[0]
        if blocks.get(module[0], block) != block:
            raise ConfigError(
                f"{where}.variants: {source!r} has the module {row['name']!r}, and block {module[0]} is "
                f"{blocks[module[0]]!r} for the layers; make both of the same model"
            )
        dense[module] = (int(row["parameters"]) - searched.get(module, 0)) * int(row["bytes"]) // int(row["parameters"])
    return tuple(_held_unit(unit, source, dense) for unit in MODULES.units(table, "none"))


def _held_unit(unit: Unit, source: str, dense: Mapping[tuple[int, str], int]) -> Unit:
    drop, keep = unit.levels
    own = sum(dense[module] for module in unit.modules)
    return replace(unit, levels=(replace(drop, source=source), replace(keep, source=source, bytes=own)))


class JointStore:
    """Several stores of variants of layers as one, for levels as `joint_units` names them."""

    def __init__(self, stores: Mapping[str, VariantStore]) -> None:
        """Read from ``stores``, by the name of their variants."""
        self.stores = dict(stores)
        self.table: pd.DataFrame = pd.concat([store.table for store in stores.values()], ignore_index=True)
        """Rows of all tables (VARIANTS schema)."""
        self._shapes = {place: shape for store in stores.values() for place, shape in store.shapes.items()}

    def packed(self, block: int, layer: str, level: str) -> dict[str, Tensor]:
        """Packed parts of a layer at a level, mapped from the file.

        Raises:
            ArtifactError: there is no such variant, or the file cannot be read.
        """
        store, label = self._of(level)
        return store.packed(block, layer, label)

    def format(self, block: int, layer: str, level: str) -> str:
        """How the parts of a layer at a level decode.

        Raises:
            ArtifactError: there is no such variant.
        """
        store, label = self._of(level)
        return store.format(block, layer, label)

    def shape(self, block: int, layer: str) -> tuple[int, int]:
        """Rows and columns of a layer."""
        return self._shapes[block, layer]

    def read_ahead(self, block: int, variants: Sequence[tuple[str, str]]) -> None:
        """Have the system read variants of a block, (layer, level) each, from disk without waiting for them.

        Raises:
            ArtifactError: there is no such variant, or the file cannot be read.
        """
        for layer, level in variants:
            store, label = self._of(level)
            store.read_ahead(block, [(layer, label)])

    def _of(self, level: str) -> tuple[VariantStore, str]:
        source, _, label = level.partition(_BETWEEN)
        return self.stores[source], label
