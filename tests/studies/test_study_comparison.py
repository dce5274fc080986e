"""Comparison over seeds: grouping, spread, and how far searches have come."""

import math

import numpy as np
import pandas as pd
import pytest

from evopress.artifacts.tables import TRACE
from evopress.report.comparison import Cell, Column, Comparison
from studies.comparison import as_comparison, group_table, mean_and_spread
from studies.plots import best_so_far

KL, TASK = Column("KL", "novels", 4, "low"), Column("quiz", "acc", 3, "high")


def compared(**values: dict[Column, float]) -> Comparison:
    comparison = Comparison()
    for model, cells in values.items():
        for column, value in cells.items():
            comparison.put(model, column, Cell(value, 0.5))
    return comparison


def test_repetitions_become_one_row_with_mean_and_sample_deviation() -> None:
    comparison = compared(
        dense={KL: 0.0, TASK: 0.9}, a0={KL: 1.0, TASK: 0.5}, a1={KL: 2.0}, a2={KL: 4.5, TASK: 0.7}, flat={KL: 3.0}
    )
    table = group_table(comparison, {"a": ["a0", "a1", "a2"], "flat": ["flat"]})
    rows = {(row.search, row.quantity): (row.mean, row.spread, row.n) for row in table.itertuples()}
    assert list(dict.fromkeys(table["search"])) == ["dense", "a", "flat"]
    assert rows["a", "KL"] == pytest.approx((2.5, np.std([1, 2, 4.5], ddof=1), 3))
    assert rows["a", "quiz"] == pytest.approx((0.6, math.sqrt(0.02), 2))
    assert ("flat", "quiz") not in rows
    assert rows["flat", "KL"][0] == 3.0 and math.isnan(rows["flat", "KL"][1])


def test_a_group_is_best_where_it_wins_by_more_than_the_spread() -> None:
    def best(*values: float) -> bool:
        comparison = compared(**{f"a{i}": {KL: value} for i, value in enumerate(values)}, flat={KL: 3.0})
        found = as_comparison(group_table(comparison, {"a": [f"a{i}" for i in range(len(values))], "flat": ["flat"]}))
        assert found.columns == [KL]
        return found.is_best("a", KL)

    assert best(2.0, 2.1, 1.9)
    assert not best(1.0, 2.9, 4.0)


def test_the_spread_of_one_value_is_unknown() -> None:
    mean, spread = mean_and_spread([2.0])
    assert mean == 2.0 and math.isnan(spread)


def test_progress_is_the_least_accepted_fitness_on_the_text_of_the_last_step() -> None:
    rows = [
        (0, 0, 0, 10, 0.1, [0.1], [3], True),  # a start, compared on less text
        (1, 0, 0, 10, 5.0, [5.0], [3], False),
        (1, 1, 0, 40, 3.0, [3.0, 3.0], [0, 1], True),
        (2, 1, -1, 0, 3.0, [3.0, 3.0], [0, 1], False),
        (2, 1, 4, 40, 2.0, [2.0, 2.0], [0, 1], True),
        (3, 1, 4, 40, 2.5, [2.0, 3.0], [0, 1], True),
    ]
    curve = best_so_far(pd.DataFrame(rows, columns=TRACE.names))
    assert curve.to_dict("list") == {"generation": [1, 2, 3], "tokens": [60, 100, 140], "best": [3.0, 2.0, 2.0]}
