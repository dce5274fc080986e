"""How large a model is, and would be once its layers are stored packed."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from evopress.artifacts.measure import average, measure_of
from evopress.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Size:
    """Size of a model, dense or compressed."""

    bits: float
    """Average over the weights of the searched layers; of sparse ones, those that are kept in the original's type."""
    bits_with_overhead: float
    """The same with scales, zeros or bitmasks."""
    total_bytes: int
    """The whole model: searched layers packed, everything else in the dense model's type."""
    sparsity: float | None = None
    """Share of the searched layers' weights that are zero; None where levels are not sparsities."""


def dense_size(checkpoint: Checkpoint, configuration: pd.DataFrame | None = None) -> Size:
    """Size of the dense model; bits are those of the layers that ``configuration`` names, or of all tensors."""
    sizes = checkpoint.sizes()
    if configuration is None:
        elements = sum(tensor.numel() for tensor in checkpoint.read(sizes).values())
        bits = 8 * sum(sizes.values()) / elements
    else:
        bits = 8 * _searched_bytes(checkpoint, sizes, configuration) / int(configuration["parameters"].sum())
    return Size(bits, bits, sum(sizes.values()))


def compressed_size(checkpoint: Checkpoint, configuration: pd.DataFrame) -> Size:
    """Size of the model that ``configuration`` (columns of CONFIGURATION) describes.

    Raises:
        KeyError: a unit is no layer of the checkpoint.
    """
    sizes = checkpoint.sizes()
    searched = _searched_bytes(checkpoint, sizes, configuration)
    parameters, packed = int(configuration["parameters"].sum()), int(configuration["bytes"].sum())
    overhead, total = 8 * packed / parameters, sum(sizes.values()) - searched + packed
    measure = measure_of(configuration)
    level = average(measure, int(configuration["cost"].sum()), parameters)
    if measure == "bits":
        return Size(level, overhead, total)
    return Size((1 - level) * 8 * searched / parameters, overhead, total, sparsity=level)


def _searched_bytes(checkpoint: Checkpoint, sizes: Mapping[str, int], configuration: pd.DataFrame) -> int:
    return sum(sizes[checkpoint.stored_name(f"{unit}.weight") or unit] for unit in configuration["unit"])
