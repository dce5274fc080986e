"""How large a model is, and would be once its layers are stored packed and its dropped modules not at all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import LAYERS, read_table
from evopress.compression.dropped import Dropped, dropped_modules, idle_tensors
from evopress.compression.families import MIXED, LayerFamily, family_of, of_modules
from evopress.models.checkpoint import Checkpoint
from evopress.util.errors import ArtifactError


@dataclass(frozen=True)
class Depth:
    """What is left of a model without some of its modules."""

    dropped: Dropped
    parameters: int
    """Of the dense model."""
    in_use: int
    """Without blocks that are gone and without the linear layers of dropped modules."""


@dataclass(frozen=True)
class Size:
    """Size of a model, dense or compressed."""

    bits: float
    """Average over the weights of the searched layers; of sparse ones, those that are kept in the original's type."""
    bits_with_overhead: float
    """The same with scales, zeros or bitmasks."""
    total_bytes: int
    """The whole model: searched layers packed, everything else in use in the dense model's type."""
    family: LayerFamily | None = None
    """Of the levels of linear layers; None where none was chosen."""
    average: float = math.nan
    """What these levels come to, as the family counts them; NaN without one."""
    depth: Depth | None = None
    """Where modules were dropped."""


def dense_size(checkpoint: Checkpoint, configuration: pd.DataFrame | None = None) -> Size:
    """Size of the dense model; bits are those of the layers that ``configuration`` names, or of all tensors."""
    sizes = checkpoint.sizes()
    layers = None if configuration is None else configuration[~of_modules(configuration)]
    if layers is None or layers.empty:
        bits = 8 * sum(sizes.values()) / sum(checkpoint.elements().values())
    else:
        bits = 8 * _searched_bytes(checkpoint, sizes, layers) / int(layers["parameters"].sum())
    return Size(bits, bits, sum(sizes.values()))


def compressed_size(checkpoint: Checkpoint, configuration: pd.DataFrame, layers: pd.DataFrame | None = None) -> Size:
    """Size of the model that ``configuration`` (columns of CONFIGURATION) describes.

    Args:
        checkpoint: of the dense model.
        configuration: levels of linear layers, of modules, or of both.
        layers: columns of LAYERS; needed for modules.

    Raises:
        ArtifactError: a module is none of the model's.
        KeyError: a unit is no layer of the checkpoint.
        ValueError: modules without ``layers``.
    """
    sizes = checkpoint.sizes()
    modules = of_modules(configuration)
    depth, idle = _depth(checkpoint, configuration, layers) if modules.any() else (None, frozenset[str]())
    total = sum(size for name, size in sizes.items() if name not in idle)
    searched = configuration[~modules]
    if searched.empty:
        bits = 8 * total / sum(count for name, count in checkpoint.elements().items() if name not in idle)
        return Size(bits, bits, total, depth=depth)
    parameters, packed = int(searched["parameters"].sum()), int(searched["bytes"].sum())
    in_use = searched[[_stored(checkpoint, unit) not in idle for unit in searched["unit"]]]
    total += int(in_use["bytes"].sum()) - _searched_bytes(checkpoint, sizes, in_use)
    family = _family_of_layers(searched)
    bits, average = _counted(checkpoint, sizes, searched)
    if family is MIXED:  # each family counts its own, and bytes are what they have in common
        own = [rows for _, rows in searched.groupby("family", sort=False)]
        weights = [int(rows["parameters"].sum()) for rows in own]
        bits = float(np.average([_counted(checkpoint, sizes, rows)[0] for rows in own], weights=weights))
        average = family.average(packed, parameters)
    return Size(bits, 8 * packed / parameters, total, family, average, depth)


def _counted(checkpoint: Checkpoint, sizes: Mapping[str, int], rows: pd.DataFrame) -> tuple[float, float]:
    """Bits without overhead, and the average, of layers as the family of their levels counts them."""
    family, cost, parameters = _family_of_layers(rows), int(rows["cost"].sum()), int(rows["parameters"].sum())
    return family.bits(cost, parameters, _searched_bytes(checkpoint, sizes, rows)), family.average(cost, parameters)


def _family_of_layers(rows: pd.DataFrame) -> LayerFamily:
    family = family_of(rows)
    if not isinstance(family, LayerFamily):
        raise ArtifactError(f"configuration: levels of the family {family.name!r} are no levels of linear layers")
    return family


def size_of(run: Run, configuration: pd.DataFrame) -> Size:
    """`compressed_size` in a run; the table of layers is read where it is needed.

    Raises:
        ArtifactError: the table of layers is missing or damaged, or does not know a module.
        ModelError: the dense checkpoint is damaged.
    """
    layers = read_table(run.layers, LAYERS) if of_modules(configuration).any() else None
    return compressed_size(Checkpoint(run.model), configuration, layers)


def _depth(
    checkpoint: Checkpoint, configuration: pd.DataFrame, layers: pd.DataFrame | None
) -> tuple[Depth, frozenset[str]]:
    """What is left, and the tensors that are not in use."""
    if layers is None:
        raise ValueError("a configuration of modules needs the table of layers")
    dropped = dropped_modules(configuration, layers)
    idle = idle_tensors(checkpoint, layers, dropped)
    elements = checkpoint.elements()
    in_use = sum(count for name, count in elements.items() if name not in idle)
    return Depth(dropped, sum(elements.values()), in_use), idle


def _stored(checkpoint: Checkpoint, unit: str) -> str:
    return checkpoint.stored_name(f"{unit}.weight") or unit


def _searched_bytes(checkpoint: Checkpoint, sizes: Mapping[str, int], configuration: pd.DataFrame) -> int:
    return sum(sizes[_stored(checkpoint, unit)] for unit in configuration["unit"])
