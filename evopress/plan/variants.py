"""Exact sizes of the variants that a method will make, layer by layer."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from evopress.compression.drop import module_table
from evopress.compression.grid import SCALE_DTYPE
from evopress.compression.packing import packed_bytes
from evopress.compression.settings import (
    CompressionSettings,
    DropSettings,
    GptqSettings,
    SparsitySettings,
    VariantSettings,
)
from evopress.compression.sparsity_levels import pattern_levels, unstructured_levels
from evopress.config.group_size import check_group_size
from evopress.plan.shape import ModelShape
from evopress.util.errors import CompressionError, ConfigError

COLUMNS = ["block", "layer", "name", "level", "value", "cost", "parameters", "bytes"]
"""Those of the VARIANTS schema that are known beforehand."""


def variant_table(shape: ModelShape, settings: VariantSettings, where: str) -> pd.DataFrame:
    """One row (`COLUMNS`) for each layer and level, in the order of blocks; of modules to drop, the MODULES schema.

    Args:
        shape: gives the layers.
        settings: method and levels.
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: a layer cannot have these levels; the message names it.
    """
    if isinstance(settings, DropSettings):
        return module_table(shape.layers.assign(bytes=shape.layers["parameters"] * shape.itemsize), settings, where)
    rows = []
    for layer in shape.layers.to_dict("records"):
        if any(fnmatchcase(layer["name"], pattern) for pattern in settings.exclude):
            continue
        try:
            levels = list(_levels(layer, settings, shape.itemsize))
        except CompressionError as error:
            raise ConfigError(f"{where}: {layer['name']}: {error}") from error
        rows += [(layer["block"], layer["layer"], layer["name"], *level) for level in levels]
    return pd.DataFrame(rows, columns=COLUMNS)


def _levels(layer: Mapping[Any, Any], settings: CompressionSettings, itemsize: int) -> Iterator[tuple[Any, ...]]:
    """Label, value, cost, parameters and bytes of each level of a layer."""
    parameters = int(layer["parameters"])
    if isinstance(settings, GptqSettings):
        for bits in settings.bits:
            yield str(bits), float(bits), bits * parameters, parameters, _quantized_bytes(layer, settings, bits)
        return
    for level in _sparsities(layer, settings):
        kept = parameters - level.removed
        yield level.label, level.removed / parameters, kept, parameters, -(-parameters // 8) + kept * itemsize


def _quantized_bytes(layer: Mapping[Any, Any], settings: GptqSettings, bits: int) -> int:
    """Codes, scales and zeros."""
    rows, columns = int(layer["rows"]), int(layer["columns"])
    grids = rows * (columns // check_group_size(settings.group_size, columns))
    zeros = 0 if settings.symmetric else packed_bytes(grids, bits)
    return packed_bytes(rows * columns, bits) + grids * SCALE_DTYPE.itemsize + zeros


def _sparsities(layer: Mapping[Any, Any], settings: SparsitySettings) -> list[Any]:
    parameters = int(layer["parameters"])
    if settings.patterns:
        return pattern_levels(parameters, int(layer["columns"]), settings.patterns)
    return unstructured_levels(parameters, settings.sparsity, settings.step, settings.levels)
