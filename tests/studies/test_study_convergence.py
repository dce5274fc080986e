"""Convergence: the engine on linear objectives, and the slopes of known laws."""

import numpy as np
import pandas as pd
import pytest

from studies.convergence import Case, bit_space, cases, convergence_table, fits, generations_to_optimum
from studies.tables import CONVERGENCE


@pytest.mark.parametrize("switches", [1, None])
def test_the_engine_reaches_the_optimum_in_about_the_generations_of_the_bound(switches: int | None) -> None:
    case = Case(units=12, kept=4, offspring=4, switches=switches, seed=0)
    assert case.bound == 4 * 8 / 4
    found = [generations_to_optimum(Case(12, 4, 4, switches, seed)) for seed in range(8)]
    assert 0.3 < np.mean(found) / case.bound < 6
    assert found == [generations_to_optimum(Case(12, 4, 4, switches, seed)) for seed in range(8)]


def test_with_all_neighbours_as_offspring_every_generation_takes_the_best_switch() -> None:
    """Each generation then replaces the heaviest kept unit by the lightest other one, so at most k are needed."""
    for seed in range(5):
        assert generations_to_optimum(Case(units=8, kept=3, offspring=15, switches=1, seed=seed)) <= 3


def test_cases_are_all_combinations_with_something_to_choose() -> None:
    found = list(cases([2, 10], [0.01, 0.5, 0.99], [1, 2], [1, None], 3))
    assert {(case.units, case.kept) for case in found} == {(2, 1), (10, 1), (10, 5), (10, 9)}
    assert len(found) == len(set(found)) == 4 * 2 * 2 * 3
    assert bit_space(10, 4).budget == 4
    table = convergence_table([Case(4, 2, 2, None, 0), Case(4, 2, 2, 1, 0)])
    assert list(table.columns) == CONVERGENCE.names and table["switches"].tolist() == ["min(U(1,3), U(1,3))", "1"]


@pytest.mark.parametrize(("slope", "power"), [(1.5, 1.0), (0.25, 1.0), (2.0, 0.5)])
def test_a_law_is_found_by_its_fit(slope: float, power: float) -> None:
    rows = []
    for units, kept, offspring in [(8, 2, 1), (16, 4, 1), (16, 4, 4), (32, 16, 2), (32, 16, 1)]:
        bound = kept * (units - kept) / offspring
        middle = slope * bound**power
        rows += [("1", units, kept, offspring, seed, bound, middle + seed - 1) for seed in range(3)]
    [fit] = fits(pd.DataFrame(rows, columns=CONVERGENCE.names)).to_dict("records")
    assert fit["exponent"] == pytest.approx(power) and fit["cases"] == 5
    if power == 1:
        assert (fit["slope"], fit["r2"]) == pytest.approx((slope, 1.0))
    else:
        assert fit["r2"] < 0.9
