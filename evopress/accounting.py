"""How large a model is, and would be once its layers are stored packed."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from evopress.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Size:
    """Size of a model, dense or compressed."""

    bits: float
    """Average over the weights of the searched layers, as the budget counts them."""
    bits_with_overhead: float
    """The same with scales, zeros or bitmasks."""
    total_bytes: int
    """The whole model: searched layers packed, everything else in the dense model's type."""


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
    rest = sum(sizes.values()) - _searched_bytes(checkpoint, sizes, configuration)
    parameters = int(configuration["parameters"].sum())
    packed = int(configuration["bytes"].sum())
    return Size(int(configuration["cost"].sum()) / parameters, 8 * packed / parameters, rest + packed)


def _searched_bytes(checkpoint: Checkpoint, sizes: Mapping[str, int], configuration: pd.DataFrame) -> int:
    return sum(sizes[checkpoint.stored_name(f"{unit}.weight") or unit] for unit in configuration["unit"])
