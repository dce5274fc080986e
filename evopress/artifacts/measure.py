"""What the levels of a table count: bits per weight, or the share of weights that are zero."""

from collections.abc import Iterable
from typing import Literal

Measure = Literal["bits", "sparsity"]


def measure_of(values: Iterable[float]) -> Measure:
    """Tell from the values of a table's levels: sparsities are below 1, bit-widths are not."""
    return "sparsity" if all(value < 1 for value in values) else "bits"


def average(measure: Measure, cost: int, parameters: int) -> float:
    """What a choice of levels comes to, from its total cost (bits, or weights that are kept)."""
    return cost / parameters if measure == "bits" else 1 - cost / parameters
