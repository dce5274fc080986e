"""Monotonicity: violations that are there are found, and noise is not taken for one."""

import math

import numpy as np
import pandas as pd
import pytest

from evopress.search.evolution.initial import even_candidate
from evopress.search.space import Level, Space, Unit
from studies.pairs import ERRORS, KEPT, Judge, find_pairs, paired, rank_correlation, sample, unit_errors


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
    assert even_candidate(about).tolist() in free.tolist()


@pytest.mark.parametrize(
    ("favoured", "other", "t"), [([1, 1], [1, 1], 0), ([2, 3], [1, 2], math.inf), ([3, 2, 7], [1, 1, 4], 2 * 3**0.5)]
)
def test_t_is_the_mean_difference_in_standard_errors(favoured: list, other: list, t: float) -> None:
    assert paired(np.array(favoured, float), np.array(other, float)).t == pytest.approx(t)
