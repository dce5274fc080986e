"""Random search, greedy descent and enumeration on toy objectives: no model, no bits."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from toy_search import run

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.search.candidates import random_candidate, random_candidates
from evopress.search.evaluating import Enumeration, fitness_of_each
from evopress.search.evaluation import Evaluation, draw_minibatch
from evopress.search.space import Space, make_space
from evopress.search.strategies.brute import every_choice
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.random import RandomSearch
from evopress.util.errors import ConfigError, SearchError

STEPS = {"variants": "v", "target": 1, "offspring": 6, "survivors": (3, 1), "tokens": (16, 64), "generations": 5}


@dataclass
class Weighted:
    """Fitness is a weighted sum of levels; fails at one of its calls, if asked to."""

    weights: np.ndarray
    fails_at: int = -1
    calls: int = 0
    tokens: int = 0

    def draw(self, tokens, rng, longest=None):
        return draw_minibatch(tokens, 64, 16, rng)

    def evaluate(self, candidates, minibatch):
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.tokens += len(candidates) * minibatch.tokens
        return [Evaluation(float(value), (float(value),)) for value in candidates @ self.weights]


class Listed(Enumeration):
    """Every choice of a space."""

    tokens: int = 32
    seed: int = 3

    def candidates(self, problem):
        return every_choice(problem.space, 70, "searches.b")


def space_of(sizes: list[int], bits: tuple[int, ...], target: float, groups: int = 1) -> Space:
    made = [
        Unit(f"u{i}", i, "layer", f"g{i % groups}", size, tuple(Level(str(b), float(b), b * size, b) for b in bits))
        for i, size in enumerate(sizes)
    ]
    return make_space(BITS, made, target, "searches.x")


def depth_of(units: int, kept: int) -> Space:
    levels = (Level("drop", 1.0, 0, 0), Level("keep", 0.0, 1, 1))
    return Space(tuple(Unit(f"b{i}", i, "b", "all", 1, levels) for i in range(units)), (kept,))


# --- random search -------------------------------------------------------------------------------------------------


def test_random_candidates_meet_the_budget_and_leave_nothing_unspent():
    rng = np.random.default_rng(0)
    space = space_of([3, 5, 7, 9, 11, 13], (2, 3, 4, 6), 3.4, groups=2)
    drawn = random_candidates(space, 50, rng)
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 50
    for candidate in drawn:
        assert space.fits(candidate)
        for unit in np.flatnonzero(candidate < space.top):
            raised = candidate.copy()
            raised[unit] += 1
            assert not space.fits(raised)
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3}, "every level should come up"


def test_every_choice_of_blocks_is_equally_likely():
    rng, space = np.random.default_rng(0), depth_of(5, 2)
    counts = Counter(random_candidate(space, rng).tobytes() for _ in range(5000))
    assert len(counts) == math.comb(5, 2)
    assert min(counts.values()) > 400 and max(counts.values()) < 600  # 500 expected, standard deviation 21


def test_a_small_space_gives_fewer_candidates_than_asked():
    assert len(random_candidates(depth_of(4, 1), 10, np.random.default_rng(0))) == 4


def test_random_search_keeps_the_best_and_judges_as_many_tokens_as_evolution(tmp_path):
    space, weights = depth_of(20, 12), np.arange(20.0)
    evaluator = Weighted(weights)
    found = run(RandomSearch(**STEPS), space, evaluator, tmp_path / "random")
    assert found.candidate @ weights == min(record["fitness"] for record in found.records)
    assert found.effort.tokens == evaluator.tokens
    evolution = Weighted(weights)
    run(Evolution(**STEPS, initial_candidates=1), space, evolution, tmp_path / "evolution")
    assert evaluator.tokens == evolution.tokens == 5 * (6 * 16 + 4 * 64)
    accepted = [record["fitness"] for record in found.records if record["accepted"]]
    assert accepted[1:] == sorted(accepted[1:], reverse=True), "without noise the best so far never gets worse"


# --- greedy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_round", [1, 3, 100])
def test_greedy_drops_what_costs_least(tmp_path, per_round):
    weights = -np.random.default_rng(0).permutation(12).astype(float)
    settings = Greedy(variants="v", target=5, tokens=32, per_round=per_round)
    evaluator = Weighted(weights)
    found = run(settings, depth_of(12, 7), evaluator, tmp_path)
    assert sorted(-weights[found.candidate == 0]) == [0, 1, 2, 3, 4]
    rounds = math.ceil(5 / per_round)
    assert evaluator.calls == rounds
    judged = sum(1 + 12 - per_round * number for number in range(rounds))
    assert found.effort.tokens == 32 * judged == 32 * len(found.records)


def test_greedy_weighs_effects_by_what_they_save(tmp_path):
    space = space_of([10, 30], (2, 3), 2.25)  # to save 30 of 120, either the large one goes down or both
    settings = Greedy(variants="v", target=2.25, tokens=16)
    found = run(settings, space, Weighted(np.array([-2.0, -3.0])), tmp_path)
    assert found.candidate.tolist() == [1, 0]


def test_greedy_meets_the_budget_and_spends_what_a_last_step_left(tmp_path):
    space = space_of([7, 100, 13, 29, 31, 5], (2, 3, 4, 8), 3.7, groups=2)
    settings = Greedy(variants="v", target=3.7, tokens=16, per_round=2)
    found = run(settings, space, Weighted(-np.array([1.0, 9, 3, 2, 8, 4])), tmp_path)
    assert space.fits(found.candidate)
    for unit in np.flatnonzero(found.candidate < space.top):
        raised = found.candidate.copy()
        raised[unit] += 1
        assert not space.fits(raised)


def test_greedy_within_its_budget_from_the_start_judges_nothing(tmp_path):
    space = space_of([10, 20], (2, 3), 3)
    settings = Greedy(variants="v", target=3, tokens=16)
    found = run(settings, space, Weighted(np.zeros(2)), tmp_path)
    assert found.candidate.tolist() == [1, 1] and found.records == []


def test_greedy_says_when_there_is_no_fitness(tmp_path):
    settings = Greedy(variants="v", target=1, tokens=16)
    with pytest.raises(SearchError, match="NaN"):
        run(settings, depth_of(4, 3), Weighted(np.full(4, np.nan)), tmp_path)


# --- enumeration ---------------------------------------------------------------------------------------------------


def test_every_choice_is_listed_once_in_an_order_that_shares_prefixes():
    listed = every_choice(depth_of(6, 4), 15, "searches.b")
    assert len(np.unique(listed, axis=0)) == len(listed) == 15
    assert (listed.sum(axis=1) == 4).all()
    assert listed.tolist() == sorted(listed.tolist())


def test_too_many_choices_are_refused_with_their_number():
    with pytest.raises(ConfigError) as error:
        every_choice(depth_of(30, 23), 10_000, "searches.b")
    assert str(error.value).startswith("searches.b.max_candidates: 7 of 30 can be dropped in 2,035,800 ways")


@pytest.mark.parametrize("part", [1, 4, 15, 99])
def test_an_enumeration_finds_the_best_and_the_fitness_of_each(tmp_path, part, monkeypatch):
    candidates, weights = every_choice(depth_of(6, 4), 15, "searches.b"), np.array([3.0, 1, 4, 1.5, 9, 2.6])
    evaluator = Weighted(weights)
    monkeypatch.setattr(Listed, "part", part)
    found = run(Listed(variants="v", target=1), depth_of(6, 4), evaluator, tmp_path)
    assert found.candidate @ weights == min(candidates @ weights)
    np.testing.assert_array_equal(fitness_of_each(found), candidates @ weights)
    assert evaluator.tokens == found.effort.tokens == 15 * 32, "each is judged once"
    assert len({tuple(record["sequences"]) for record in found.records}) == 1, "all on the same tokens"


# --- death and restart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "greedy", "enumeration"])
def test_a_search_that_was_cut_short_ends_as_one_that_was_not(tmp_path, strategy, monkeypatch):
    monkeypatch.setattr(Listed, "part", 10)
    space, weights = depth_of(8, 4), -(np.arange(8.0) ** 2)
    rounds = {
        "random": RandomSearch(**STEPS),
        "greedy": Greedy(variants="v", target=4, tokens=100),
        "enumeration": Listed(variants="v", target=1, tokens=100, seed=1),
    }[strategy]
    whole = run(rounds, space, Weighted(weights), tmp_path / "whole")
    for fails_at in (1, 2, 0):
        with pytest.raises(KeyboardInterrupt):
            run(rounds, space, Weighted(weights, fails_at), tmp_path / "cut")
    found = run(rounds, space, Weighted(weights), tmp_path / "cut")
    assert found.candidate.tolist() == whole.candidate.tolist()
    assert found.records == whole.records
    assert found.effort.tokens == whole.effort.tokens and found.effort.seconds > 0
