"""Searches that differ in nothing but their seed, as one: mean and spread of everything that was measured."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from evopress.artifacts.study_tables import COMPARISON
from evopress.report.comparison import Cell, Column, Comparison

TOKENS = Column("tokens", "judged, thousands", 0, "")
SECONDS = Column("time", "s", 0, "")


def group_table(comparison: Comparison, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Mean and sample standard deviation of each column over the searches of each group.

    Args:
        comparison: one row a search.
        groups: names of the searches of each group; models of the comparison that no group names stay alone.

    Returns:
        Columns of COMPARISON; a search in which a quantity was not measured does not count for it.
    """
    grouped = {name for searches in groups.values() for name in searches}
    alone = {model: [model] for model in comparison.rows if model not in grouped}
    rows = []
    for group, searches in {**alone, **groups}.items():
        for column in comparison.columns:
            values = [comparison.rows[name][column].value for name in searches if column in comparison.rows[name]]
            if values:
                about = (group, column.title, column.subtitle, column.better, column.digits)
                rows.append((*about, *mean_and_spread(values), len(values)))
    return pd.DataFrame(rows, columns=COMPARISON.names)


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is NaN of a single value."""
    array = np.array(list(values), dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def as_comparison(table: pd.DataFrame) -> Comparison:
    """Rows of COMPARISON as a comparison whose cells have the spread for their error."""
    comparison = Comparison()
    for row in table.to_dict("records"):
        column = Column(row["quantity"], row["of"], int(row["digits"]), row["better"])
        comparison.put(row["search"], column, Cell(row["mean"], row["spread"]))
    return comparison
