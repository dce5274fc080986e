"""Dynamic programming against trying every candidate."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from toy_search import problem_of, run

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.search.budget import least_error
from evopress.search.evaluating import fitness_of_each
from evopress.search.evaluation import Evaluation, Minibatch, draw_minibatch
from evopress.search.sensitivity import by_unit_and_level, each_at_every_level
from evopress.search.space import DENSE_LEVEL, Space, make_space
from evopress.search.strategies.dp import DynamicProgramming, table_errors
from evopress.util.errors import ArtifactError

PLENTY = 1_000_000


def space_of(rng: np.random.Generator, sizes: list[int], bits: list[tuple[int, ...]], target: float) -> Space:
    """Units of two groups by turns, with random errors that need not fall with the cost."""
    units = []
    for number, (size, levels) in enumerate(zip(sizes, bits, strict=True)):
        made = tuple(Level(str(b), float(b), b * size, b, float(rng.random())) for b in levels)
        units.append(Unit(f"u{number}", number, "layer", f"group{number % 2}", size, made))
    return make_space(BITS, units, target, "searches.x")


def exhaustive(space: Space, errors: np.ndarray) -> float:
    """Least error of all candidates that meet the budget."""
    rows = np.arange(len(space.units))
    candidates = (np.array(levels, dtype=np.int16) for levels in product(*(range(top + 1) for top in space.top)))
    return min(errors[rows, candidate].sum() for candidate in candidates if space.fits(candidate))


@pytest.mark.parametrize("seed", range(12))
def test_no_candidate_has_a_smaller_sum_of_errors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 40, size=6).tolist()
    bits = [((2, 3, 4), (2, 3, 4, 6), (3, 4), (3,))[rng.integers(4)] for _ in sizes]
    space = space_of(rng, sizes, bits, 3.3)
    errors = table_errors(space)
    found = least_error(space, errors, PLENTY)
    assert space.fits(found) and (found <= space.top).all()
    assert errors[np.arange(6), found].sum() == pytest.approx(exhaustive(space, errors), rel=1e-12)


@pytest.mark.parametrize("resolution", [1, 3, 17, 200])
def test_a_coarse_budget_holds_and_is_spent_and_a_finer_one_errs_less(resolution: int) -> None:
    rng = np.random.default_rng(1)
    space = space_of(rng, rng.integers(101, 997, size=6).tolist(), [(2, 3, 4, 5)] * 6, 3.1)
    errors = np.sort(table_errors(space), axis=1)[:, ::-1]  # falling, so that every step up helps
    found = least_error(space, errors, resolution)
    assert space.fits(found)
    for unit in np.flatnonzero(found < space.top):
        found[unit] += 1
        assert not space.fits(found)
        found[unit] -= 1
    best = exhaustive(space, errors)
    assert errors[np.arange(6), found].sum() <= best * (3 if resolution < 17 else 1.1)


def test_equal_sizes_are_exact_at_any_resolution_that_has_their_steps() -> None:
    rng = np.random.default_rng(2)
    space = space_of(rng, [1000] * 6, [(2, 3, 4)] * 6, 3)
    errors = table_errors(space)
    found = least_error(space, errors, resolution=6)  # six steps of 1000 in all, three in each group
    assert errors[np.arange(6), found].sum() == pytest.approx(exhaustive(space, errors))


def test_a_budget_that_allows_the_lowest_levels_alone() -> None:
    space = space_of(np.random.default_rng(3), [10, 20], [(2, 3), (2, 4)], 2)
    assert least_error(space, table_errors(space), PLENTY).tolist() == [0, 0]


def test_variants_without_errors_are_refused() -> None:
    level = (Level("2", 2.0, 2, 1),)
    space = Space((Unit("model.q", 0, "q", "all", 1, level),), (2,))
    with pytest.raises(ArtifactError, match=r"variants of model.q have no layer errors.*errors: propagated"):
        table_errors(space)


def test_each_unit_is_measured_alone_at_each_of_its_levels() -> None:
    space = space_of(np.random.default_rng(4), [10, 20, 30], [(2, 3), (3,), (2, 3, 4)], 3)
    candidates = each_at_every_level(space)
    assert candidates.shape == (6, 3)
    assert ((candidates != DENSE_LEVEL).sum(axis=1) == 1).all()
    errors = by_unit_and_level(space, np.arange(6.0))
    for number, candidate in enumerate(candidates):
        unit = int(np.flatnonzero(candidate != DENSE_LEVEL)[0])
        assert errors[unit, candidate[unit]] == number
    assert np.isinf(errors).sum() == 3


@dataclass
class Summed:
    """Each level adds its ``harm`` [units, most levels] to ``dense``, the objective of the dense model."""

    harm: np.ndarray
    dense: float

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        return draw_minibatch(tokens, 20, 128, rng, longest)

    def evaluate(self, candidates: np.ndarray, minibatch: Minibatch) -> list[Evaluation]:
        assert minibatch.precise
        harm = np.where(candidates == DENSE_LEVEL, 0.0, self.harm[np.arange(len(self.harm)), candidates])
        return [Evaluation(value, (value,)) for value in (self.dense + harm.sum(axis=1)).tolist()]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("errors", ["kl", "propagated"])
def test_the_optimum_of_a_sum_is_found(seed: int, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    space = space_of(rng, rng.integers(5, 40, size=6).tolist(), [(2, 3, 4), (3,), (2, 3, 4, 6)] * 2, 3.2)
    harm = rng.lognormal(0, 1.5, space.costs.shape)  # need not fall with the cost
    settings = DynamicProgramming(variants="v", target=3.2, errors=errors, tokens=256, resolution=PLENTY)
    monkeypatch.setattr(DynamicProgramming, "part", 5)
    result = run(settings, space, Summed(harm, dense=0.25), tmp_path)
    errors_of_each = by_unit_and_level(space, fitness_of_each(result))
    chosen = least_error(space, errors_of_each, settings.resolution)
    assert space.fits(chosen)
    assert harm[np.arange(6), chosen].sum() == pytest.approx(exhaustive(space, harm))
    assert result.effort.tokens >= 256 * len(each_at_every_level(space))
    lengths = {len(record["sequences"]) for record in result.records}
    assert lengths == ({8} if errors == "kl" else {2})  # pieces of 32 tokens, or whole sequences of 128


def test_every_level_of_every_unit_is_planned_in_float32() -> None:
    space = space_of(np.random.default_rng(4), [10, 20, 30], [(2, 3), (3,), (2, 3, 4)], 3)
    settings = DynamicProgramming(variants="v", target=3, errors="kl", tokens=4096)
    (asked,) = settings.evaluations(problem_of(space), np.random.default_rng(0))
    assert (asked.candidates == each_at_every_level(space)).all()
    assert (asked.tokens, asked.longest, asked.precise) == (4096, 256, True)
    assert settings.tokens_asked() == {"tokens": 4096}
    assert (
        settings.model_copy(update={"errors": "table"}).evaluations(problem_of(space), np.random.default_rng(0)) == []
    )
