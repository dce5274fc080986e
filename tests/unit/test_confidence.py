"""Selection that asks for confidence: how often a better parent is lost to the noise of its minibatch."""

import math

import numpy as np
import pytest
from toy_search import problem_of

from evopress.compression.base import Level, Unit
from evopress.search.evaluation import Evaluation, Minibatch, draw_minibatch
from evopress.search.selection import State, Step, select_next, surely_best, t_tail
from evopress.search.space import Space
from evopress.search.strategies.evolution import Evolution
from evopress.util.errors import SearchError

TRIALS = 600


class Noisy:
    """The first level of a candidate is its worth, of which each sequence shows something else."""

    def __init__(self, scale: float, spread: float, sequences: int = 1000, length: int = 16) -> None:
        self.scale, self.spread, self.sequences, self.length = scale, spread, sequences, length
        self.rng = np.random.default_rng(0)

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        return draw_minibatch(tokens, self.sequences, self.length, rng, longest)

    def evaluate(self, candidates: np.ndarray, minibatch: Minibatch) -> list[Evaluation]:
        count, weights = len(minibatch.sequences), np.array(minibatch.lengths) / minibatch.tokens
        common = self.rng.normal(0, 10 * self.spread, count)  # texts differ far more than candidates
        shown = [worth + common + self.rng.normal(0, self.spread, count) for worth in candidates[:, 0] * self.scale]
        return [Evaluation(float(weights @ seen), tuple(seen.tolist())) for seen in shown]


def replaced(
    confidence: float,
    scale: float,
    *,
    offspring: int = 6,
    population: int = 1,
    tokens: int = 8 * 16,
    sequences: int = 1000,
) -> float:
    """Share of generations in which offspring of worth 1 replace a parent of worth 0."""
    evaluator, rng = Noisy(scale, spread=1.0, sequences=sequences), np.random.default_rng(1)
    parents = np.stack([[0, number] for number in range(population)]).astype(np.int16)
    children = np.stack([[1, number] for number in range(offspring)]).astype(np.int16)
    lost = 0
    for _ in range(TRIALS):
        steps = [Step(population, tokens)]
        state, rows = select_next(State(0, parents), children, steps, evaluator, rng, confidence)
        lost += bool(state.population[:, 0].any())
        assert sum(row.accepted for row in rows) == population == len(state.population)
    return lost / TRIALS


@pytest.mark.parametrize("offspring", [1, 6])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_parent_that_is_better_is_kept_with_the_confidence_asked_for(confidence: float, offspring: int) -> None:
    chance = 1 - confidence
    within = chance + 3 * math.sqrt(chance * confidence / TRIALS)
    assert replaced(confidence, scale=0.001, offspring=offspring) <= within  # barely better: the hardest case
    assert replaced(confidence, scale=0.5, offspring=offspring) <= within


def test_without_confidence_the_best_of_noisy_offspring_replaces_a_better_parent() -> None:
    assert replaced(0.0, scale=0.5) > 0.4


def test_an_offspring_that_is_clearly_better_replaces_its_parent() -> None:
    assert replaced(0.95, scale=-4.0) > 0.95
    assert replaced(0.95, scale=-0.2, tokens=500 * 16) > 0.5  # more text tells smaller differences apart


def test_parents_of_a_population_are_each_kept_unless_surely_worse() -> None:
    assert replaced(0.95, scale=0.5, population=3) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / TRIALS)
    minibatch = Minibatch((0, 1, 2, 3), (2,) * 4)
    worth = [[1.0, 1.1, 0.9, 1.0], [3.0, 3.1, 2.9, 3.0], [2.0, 2.1, 1.9, 2.05], [0.5, 3.0, 1.0, 3.0]]
    found = [Evaluation(float(np.mean(shown)), tuple(shown)) for shown in worth]
    assert surely_best(found, 2, 2, minibatch, 0.9).tolist() == [0, 2]  # the worse parent goes, for the sure one
    assert surely_best(found[:1] + found[3:], 1, 2, minibatch, 0.9).tolist() == [0, 1]  # there is room for both


def test_what_has_no_fitness_is_no_obstacle_and_no_winner() -> None:
    minibatch, nan = Minibatch((0, 1), (2, 2)), Evaluation(math.nan, (math.nan, 1.0))
    fine = Evaluation(1.0, (1.0, 1.0))
    assert surely_best([nan, fine], 1, 1, minibatch, 0.9).tolist() == [1]
    assert surely_best([fine, nan], 1, 1, minibatch, 0.9).tolist() == [0]
    assert surely_best([fine, Evaluation(0.5, (0.5, 0.5))], 1, 1, minibatch, 0.9).tolist() == [1]  # without any noise
    assert surely_best([fine, fine], 1, 1, minibatch, 0.9).tolist() == [0]


def test_a_cut_sequence_counts_by_its_tokens() -> None:
    parent, child = Evaluation(0.0, (0.0,) * 5), Evaluation(0.0, (-1.0, -1.1, -0.9, -1.0, 1000.0))
    assert surely_best([parent, child], 1, 1, Minibatch((0, 1, 2, 3, 4), (10**6,) * 4 + (1,)), 0.9).tolist() == [1]
    assert surely_best([parent, child], 1, 1, Minibatch((0, 1, 2, 3, 4), (16,) * 5), 0.9).tolist() == [0]


def test_one_sequence_tells_nothing_of_chance() -> None:
    with pytest.raises(SearchError, match=r"confidence: .* only one; set data\.search\.tokens"):
        replaced(0.9, scale=1.0, tokens=16, sequences=1)


def test_tokens_of_one_long_sequence_are_spread_over_several() -> None:
    evaluator, rng = Noisy(1.0, spread=1.0, length=1024), np.random.default_rng(0)
    parents, children = np.array([[0, 0]], dtype=np.int16), np.array([[1, 0], [2, 0]], dtype=np.int16)
    _, rows = select_next(State(0, parents), children, [Step(1, 32), Step(1, 64)], evaluator, rng, 0.9)
    assert {row.minibatch.lengths for row in rows} == {(32,), (8,) * 8}


def test_the_setting_reaches_the_selection() -> None:
    levels = tuple(Level(str(level), float(level), level, 0) for level in (0, 1))
    space = Space(tuple(Unit(f"u{unit}", unit, "x", "all", 1, levels) for unit in range(4)), (2,))
    settings = Evolution(variants="v", target=1, offspring=2, survivors=(1,), tokens=(64,), confidence=0.99)
    parent = np.array([1, 1, 0, 0], dtype=np.int16)

    def ended(confidence: float) -> set[bytes]:
        changed = settings.model_copy(update={"confidence": confidence})
        evaluator, rng = Noisy(0.0, 1.0), np.random.default_rng(2)
        states = [changed.next_round(State(0, parent[None]), problem_of(space), evaluator, rng) for _ in range(40)]
        return {state.parent.tobytes() for state, _ in states}

    assert len(ended(0.0)) > 2 and len(ended(0.999)) <= 2


@pytest.mark.parametrize(
    ("t", "degrees", "chance"),
    [(12.706, 1, 0.025), (2.228, 10, 0.025), (-2.228, 10, 0.975), (0.0, 3, 0.5), (1.66, 100, 0.05)],
)
def test_the_tail_of_students_t(t: float, degrees: int, chance: float) -> None:
    assert t_tail(t, degrees) == pytest.approx(chance, rel=2e-3)
