"""Studies: grouping and spread, slopes of known laws, violations that are there and noise that is none."""

import math

import numpy as np
import pandas as pd
import pytest

from evopress.artifacts.study_tables import CONVERGENCE
from evopress.artifacts.tables import TRACE
from evopress.compression.base import Level, Unit
from evopress.config.studies import MonotonicitySettings, require_text
from evopress.report.comparison import Cell, Column, Comparison
from evopress.search.candidates import uniform_start
from evopress.search.space import Space
from evopress.studies.comparison import as_comparison, group_table, mean_and_spread
from evopress.studies.convergence import Case, bit_space, cases, convergence_table, fits, generations_to_optimum
from evopress.studies.monotonicity import (
    ERRORS,
    KEPT,
    Judge,
    find_pairs,
    paired,
    rank_correlation,
    sample,
    unit_errors,
)
from evopress.studies.progress import best_so_far

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


def space(errors: bool = True, units: int = 10) -> Space:
    """Units with three levels whose layer errors are 4, 1 and 0."""
    heights = (4.0, 1.0, 0.0) if errors else (math.nan,) * 3
    levels = tuple(Level(str(cost), cost, cost, 0, error) for cost, error in enumerate(heights))
    return Space(tuple(Unit(f"u{number}", number, "u", "all", 1, levels) for number in range(units)), (units,))


def judge(harm: np.ndarray, noise: float, sequences: int, seed: int) -> Judge:
    """Fitness is the sum over units of ``harm[unit, level]``; all sequences differ, and so does every judgement."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=sequences)

    def run(candidates: np.ndarray) -> np.ndarray:
        true = harm[np.arange(len(harm)), candidates].sum(axis=1)
        return true[:, None] + 3 * shared + noise * rng.normal(size=(len(candidates), sequences))

    return run


def search(harm: np.ndarray, noise: float, errors: bool = True, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    about = space(errors, len(harm))
    look, confirm = judge(harm, noise, 4, seed), judge(harm, noise, 32, seed + 1)
    own = unit_errors(about, look)
    return find_pairs(about, sample(about, own, 16, 6, 8, np.random.default_rng(seed)), own, look, confirm, 6, 4.0)


MONOTONE = np.tile([4.0, 1.0, 0.0], (10, 1))


def test_a_unit_that_is_better_low_is_found_out() -> None:
    harm = MONOTONE.copy()
    harm[3] = [0.0, 6.0, 12.0]
    candidates, pairs = search(harm, noise=0.1)
    levels = np.array(candidates["levels"].tolist())
    for claim in (ERRORS, KEPT):
        confirmed = pairs[(pairs["claim"] == claim) & pairs["confirmed"]]
        assert len(confirmed) > 0
        for pair in confirmed.to_dict("records"):
            favoured, other = levels[pair["favoured"]], levels[pair["other"]]
            true = [harm[np.arange(10), which].sum() for which in (favoured, other)]
            assert true[0] > true[1] and pair["favoured_fitness"] > pair["other_fitness"]
            assert pair["difference"] == pytest.approx(true[0] - true[1], abs=0.2)
            if claim == KEPT:
                assert (favoured >= other).all() and (favoured - other).sum() == 1 and favoured[3] > other[3]
            else:
                assert pair["favoured_error"] < pair["other_error"]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_taken_for_a_violation(seed: int) -> None:
    _, pairs = search(np.zeros((10, 3)), noise=1.0, seed=seed)
    assert len(pairs) > 8 and not pairs["confirmed"].any()  # suspects there are, chosen for their noise


def test_where_the_claims_hold_nothing_speaks_against_them() -> None:
    candidates, pairs = search(MONOTONE, noise=0.0)
    assert not pairs["confirmed"].any()
    assert rank_correlation(candidates) == pytest.approx(1)


def test_without_layer_errors_those_of_units_alone_are_measured() -> None:
    harm = np.random.default_rng(1).uniform(size=(10, 3))
    harm[:, 2] = 0
    assert unit_errors(space(errors=False), judge(harm, 0.0, 4, 0)) == pytest.approx(harm)
    assert unit_errors(space(), judge(harm, 0.0, 4, 0)) == pytest.approx(MONOTONE)
    candidates, _ = search(harm, noise=0.0, errors=False)
    assert rank_correlation(candidates) == pytest.approx(1)


def test_a_sample_keeps_to_the_budget_and_raises_one_unit() -> None:
    about = space()
    errors = np.random.default_rng(1).random((10, 3))
    drawn = sample(about, errors, 12, 5, 6, np.random.default_rng(0))
    free = drawn.candidates[drawn.bases < 0]
    assert len(np.unique(free, axis=0)) == len(free) and all(about.fits(candidate) for candidate in free)
    for candidate, base in zip(drawn.candidates, drawn.bases, strict=True):
        if base >= 0:
            assert sorted((candidate - drawn.candidates[base]).tolist()) == [0] * 9 + [1]
    sums = errors[np.arange(10), free].sum(axis=1)
    assert sums.argmin() == 0  # what the first claim would have one choose
    assert uniform_start(about).tolist() in free.tolist()


@pytest.mark.parametrize(
    ("favoured", "other", "t"), [([1, 1], [1, 1], 0), ([2, 3], [1, 2], math.inf), ([3, 2, 7], [1, 1, 4], 2 * 3**0.5)]
)
def test_t_is_the_mean_difference_in_standard_errors(favoured: list, other: list, t: float) -> None:
    assert paired(np.array(favoured, float), np.array(other, float)).t == pytest.approx(t)


def test_text_too_short_or_too_few_sequences_are_refused() -> None:
    study = MonotonicitySettings(variants="v", target=3, tokens=100, confirm_tokens=64)
    with pytest.raises(ValueError, match=r"take 13 \+ 8 sequences, but the search text has 20"):
        require_text(study, 20, 8)
    assert require_text(study, 21, 8) == (13, 8)
    with pytest.raises(ValueError, match="tokens: 100 tokens are one sequence; ask for at least 129"):
        require_text(study, 100, 128)
    with pytest.raises(ValueError, match=r"confirm_tokens: 64 tokens are 4 sequences.*at least 128"):
        require_text(study, 100, 16)
