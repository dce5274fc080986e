"""What the levels of a table count: bits per weight, the share of weights that are zero, or modules that stay."""

from typing import Literal

import pandas as pd

Measure = Literal["bits", "sparsity", "depth"]

KEEP, DROP = "keep", "drop"
"""Labels of the two levels of a module in depth pruning."""


def of_modules(table: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of a table (with the column level) are of modules, kept or dropped whole; the others are of layers."""
    return table["level"].isin((KEEP, DROP))


def measure_of(table: pd.DataFrame) -> Measure:
    """Tell from the levels of a table (columns level and value): depth where all rows are of modules.

    Else the rows of layers decide: sparsities are below 1, bit-widths are not.
    """
    layers = table.loc[~of_modules(table), "value"]
    if layers.empty:
        return "depth"
    return "sparsity" if (layers < 1).all() else "bits"


def average(measure: Measure, cost: int, parameters: int) -> float:
    """What a choice of levels of layers comes to, from its total cost (bits, or weights that are kept)."""
    return cost / parameters if measure == "bits" else 1 - cost / parameters
