"""The start from measured sensitivities: what is judged, what follows from it, and that it beats the uniform start."""

import math

import numpy as np
import pytest
from toy_search import first_state

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.search.budget import relaxed_least_error
from evopress.search.candidates import uniform_start
from evopress.search.evaluation import Evaluation, Minibatch, draw_minibatch
from evopress.search.sensitivity import (
    Effects,
    effects_of_levels,
    measured_starts,
    reference_levels,
    single_effects,
)
from evopress.search.space import DENSE_LEVEL, Space, make_space

ERRORS = {2: 0.03, 3: 0.007, 4: 0.0016, 5: 0.0004, 6: 0.0001}


def unit(number: int, parameters: int, *, bits: tuple[int, ...] = (2, 3, 4, 5, 6), errors: bool = True) -> Unit:
    levels = tuple(
        Level(str(b), float(b), b * parameters, b * parameters // 8, ERRORS[b] if errors else math.nan) for b in bits
    )
    return Unit(f"model.layers.{number}.proj", number, "proj", "all", parameters, levels)


class Additive:
    """Fitness that is a sum over units of sensitivity times error, plus what the tokens' choice adds to all alike."""

    text = (8, 16)

    def __init__(self, sensitivities: np.ndarray, space: Space) -> None:
        rows = [[ERRORS[int(level.value)] for level in unit.levels] for unit in space.units]
        width = max(map(len, rows))
        errors = np.array([row + row[-1:] * (width - len(row)) for row in rows])
        self.effects = sensitivities[:, None] * errors
        self.judged: list[np.ndarray] = []
        self.minibatches: list[Minibatch] = []

    def draw(self, tokens, rng, longest=None):
        return draw_minibatch(tokens, *self.text, rng, longest)

    def fitness(self, candidate: np.ndarray) -> float:
        compressed = np.flatnonzero(candidate != DENSE_LEVEL)
        return float(self.effects[compressed, candidate[compressed]].sum())

    def evaluate(self, candidates, minibatch):
        self.judged.append(candidates)
        self.minibatches.append(minibatch)
        found = [self.fitness(candidate) for candidate in candidates]
        return [Evaluation(fitness, (fitness,) * len(minibatch.sequences)) for fitness in found]


def brute_force(space: Space, effects: np.ndarray) -> float:
    """Least summed effect of all candidates within the budget."""
    grids = np.meshgrid(*[np.arange(top + 1) for top in space.top], indexing="ij")
    candidates = np.stack([grid.ravel() for grid in grids], axis=1)
    units = np.arange(len(space.units))
    costs, sums = space.costs[units, candidates].sum(axis=1), effects[units, candidates].sum(axis=1)
    return float(sums[costs <= space.budget].min())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(16,), (16, 48)])
def test_allocation_is_the_best_of_all_candidates_within_the_budget(seed, sizes):
    rng = np.random.default_rng(seed)
    space = make_space(BITS, [unit(i, int(rng.choice(sizes))) for i in range(6)], 3.0, "searches.x")
    effects = rng.lognormal(0, 1.5, 6)[:, None] * np.array([list(ERRORS.values())] * 6)
    chosen = relaxed_least_error(space, effects)
    assert space.fits(chosen)
    best, reached = brute_force(space, effects), effects[np.arange(6), chosen].sum()
    if len(sizes) == 1:  # convex effects and equal steps: greedy is exact
        assert reached == pytest.approx(best)
    else:  # otherwise it misses at most what one step is worth
        assert reached - best <= np.abs(np.diff(effects, axis=1)).max()
        assert reached < effects[:, 1].sum()


@pytest.mark.parametrize("target", [3.0, 4.5])
def test_each_unit_is_judged_alone_at_the_middle_one_of_its_levels_whatever_the_target(target):
    units = [unit(0, 16), unit(1, 16, bits=(2, 3, 4, 5)), unit(2, 16, bits=(3,))]
    space = make_space(BITS, units, target, "searches.x")
    evaluator = Additive(np.array([1.0, 5.0, 1.0]), space)
    effects = single_effects(space, 32, evaluator, np.random.default_rng(0))
    assert [candidate.tolist() for candidate in evaluator.judged[0]] == [
        [-1, -1, -1],
        [2, -1, -1],
        [-1, 1, -1],
    ]
    assert effects.alone == ((0, 2), (1, 1)) and effects.fitness == pytest.approx((ERRORS[4], 5 * ERRORS[3]))
    assert all(math.isnan(error) for error in effects.hidden_errors)
    both = single_effects(space, 32, evaluator, np.random.default_rng(0), 2)
    assert both.alone == ((0, 2), (1, 1), (0, 0), (1, 0))
    assert both.fitness == pytest.approx((ERRORS[4], 5 * ERRORS[3], ERRORS[2], 5 * ERRORS[2]))


def test_effects_are_proportional_to_errors_beyond_the_measured_levels_and_a_power_of_them_between():
    space = make_space(BITS, [unit(i, 16) for i in range(3)], 3.0, "searches.x")
    errors = np.array(list(ERRORS.values()))
    alone = ((0, 2), (1, 2), (2, 2), (1, 0), (2, 0))
    effects = effects_of_levels(space, alone, np.array([0.8, 0.8, 0.8, 30.0, 0.5]))
    assert effects[0] == pytest.approx(0.8 * errors / errors[2])
    power = math.log(30.0 / 0.8) / math.log(errors[0] / errors[2])
    assert effects[1] == pytest.approx([*0.8 * (errors[:2] / errors[2]) ** power, *0.8 * errors[2:] / errors[2]])
    assert effects[2] == pytest.approx([0.8, 0.8, *0.8 * errors[2:] / errors[2]])  # less at a lower level is noise


def test_two_measured_levels_show_what_layer_errors_do_not():
    class Steep(Additive):
        """Every other unit bears its lowest level worse than its layer error says."""

        def __init__(self, space: Space) -> None:
            super().__init__(np.ones(len(space.units)), space)
            self.effects[::2, 0] *= 20

    space = make_space(BITS, [unit(i, 16) for i in range(12)], 2.5, "searches.x")
    evaluator = Steep(space)
    by_middle, by_both = measured_starts(space, single_effects(space, 32, evaluator, np.random.default_rng(0), 2))
    assert space.fits(by_middle) and space.fits(by_both)
    assert evaluator.fitness(by_both) < 0.5 * evaluator.fitness(by_middle)


def test_levels_that_a_cheaper_one_outdoes_are_no_reference():
    """As of a model that comes as Q4_1, for which larger types only round once more."""
    errors = {"IQ4_NL": 2e-3, "Q4_1": 2e-6, "Q5_0": 7e-4, "Q8_0": 1e-5}
    levels = tuple(Level(label, 4 + k, 10 + k, 10 + k, error) for k, (label, error) in enumerate(errors.items()))
    more = (Level("Q2_K", 2.6, 5, 5, 3e-2), Level("Q3_K", 3.4, 7, 7, 9e-3), *levels)
    units = [Unit(f"l{i}", i, "proj", "all", 20, offered) for i, offered in enumerate((levels, more))]
    references = [reference_levels(Space(tuple(units), (100,)), unit) for unit in (0, 1)]
    assert references == [(0,), (1, 0)]  # IQ4_NL; Q3_K and Q2_K


@pytest.mark.parametrize(("tokens", "lengths"), [(16, (16,)), (128, (32,) * 4), (1024, (64,) * 16)])
def test_units_are_judged_alone_on_pieces_of_many_sequences(tokens, lengths):
    space = make_space(BITS, [unit(i, 16) for i in range(3)], 3.0, "searches.x")
    evaluator = Additive(np.ones(3), space)
    evaluator.text = (20, 128)
    single_effects(space, tokens, evaluator, np.random.default_rng(0))
    assert [minibatch.lengths for minibatch in evaluator.minibatches] == [lengths]
    assert all(minibatch.precise for minibatch in evaluator.minibatches)


def test_levels_far_from_dense_are_told_apart_by_what_they_cost_beyond_the_dense_model():
    """Sparsity: the dearest level is far from dense, so its effect is no zero to measure from."""
    sparse = tuple(Level(str(k), 0.0, 100 + k, 0, error) for k, error in enumerate((0.5, 0.45, 0.4)))
    units = [Unit(f"l{i}", i, "proj", "all", 200, sparse) for i in range(6)]
    space = Space(tuple(units), (6 * 101,))
    scale = np.array([1.0, 8.0, 2.0, 0.5, 4.0, 1.5])

    class Scaled(Additive):
        def __init__(self) -> None:
            self.effects = scale[:, None] * np.array([0.5, 0.45, 0.4])
            self.judged, self.minibatches = [], []

    (candidate,) = measured_starts(space, single_effects(space, 32, Scaled(), np.random.default_rng(0)))
    assert candidate.tolist() == [0, 2, 2, 0, 2, 0]  # the three most sensitive are pruned less


@pytest.mark.parametrize("errors", [True, False])
def test_the_measured_start_beats_the_even_one(errors):
    rng = np.random.default_rng(3)
    space = make_space(BITS, [unit(i, 16 if i % 3 else 64, errors=errors) for i in range(30)], 3.0, "searches.x")
    evaluator = Additive(rng.lognormal(0, 1.2, 30), space)
    state, rows = first_state(space, 8, 32, evaluator, np.random.default_rng(0), 64)
    assert space.fits(state.parent)
    assert evaluator.fitness(state.parent) < 0.9 * evaluator.fitness(uniform_start(space))
    assert len(rows) == 2 and {row.step for row in rows} == {0}  # the measured start and the even one
    assert sum(row.accepted for row in rows) == 1


def test_the_even_start_is_kept_where_it_is_better():
    class Deceptive(Additive):
        """Alone, the last units cost nothing; together with others they do."""

        def fitness(self, candidate):
            uneven = np.count_nonzero(candidate != 1)
            return super().fitness(candidate) + (uneven if np.count_nonzero(candidate != DENSE_LEVEL) > 1 else 0)

    space = make_space(BITS, [unit(i, 16) for i in range(10)], 3.0, "searches.x")
    evaluator = Deceptive(np.geomspace(1, 1e-6, 10), space)
    state, _ = first_state(space, 8, 32, evaluator, np.random.default_rng(0), 64)
    assert state.parent.tolist() == uniform_start(space).tolist()


def test_a_target_between_levels_starts_from_what_was_measured_and_draws_no_random_starts():
    space = make_space(BITS, [unit(i, 16) for i in range(12)], 2.5, "searches.x")
    evaluator = Additive(np.geomspace(1, 1e-3, 12), space)
    state, rows = first_state(space, 6, 32, evaluator, np.random.default_rng(0), 64)
    (measured,) = measured_starts(space, single_effects(space, 64, evaluator, np.random.default_rng(0)))
    assert space.fits(state.parent) and state.parent.tolist() == measured.tolist()
    assert not rows  # there is nothing to compare it with
    earlier = np.array([1, 0] * 6, dtype=np.int16)
    state, rows = first_state(space, 6, 32, evaluator, np.random.default_rng(0), 64, earlier=[earlier])
    assert {row.levels for row in rows} == {tuple(measured.tolist()), tuple(earlier.tolist())}
    assert state.parent.tolist() == measured.tolist()


def test_random_starts_are_drawn_where_no_other_is_asked_for():
    space = make_space(BITS, [unit(i, 16) for i in range(12)], 2.5, "searches.x")
    state, rows = first_state(space, 6, 32, Additive(np.geomspace(1, 1e-3, 12), space), np.random.default_rng(0))
    assert len(rows) == 6 and space.fits(state.parent)


def test_errors_of_hidden_states_give_a_second_start_which_the_fitness_judges():
    class Noisy(Additive):
        """Alone, a unit's effect on the fitness is mostly noise; its error of hidden states shows it."""

        def evaluate(self, candidates, minibatch):
            judged = super().evaluate(candidates, minibatch)
            alone = [np.count_nonzero(candidate != DENSE_LEVEL) <= 1 for candidate in candidates]
            noise = np.random.default_rng(0).lognormal(0, 1.5, len(candidates))
            return [
                Evaluation(found.fitness * (noise[i] if alone[i] else 1), found.by_sequence, found.fitness * 7)
                for i, found in enumerate(judged)
            ]

    space = make_space(BITS, [unit(i, 16) for i in range(20)], 3.0, "searches.x")
    evaluator = Noisy(np.random.default_rng(1).lognormal(0, 1.5, 20), space)
    by_fitness, by_both = measured_starts(space, single_effects(space, 32, evaluator, np.random.default_rng(0)))
    assert space.fits(by_fitness) and space.fits(by_both)
    assert evaluator.fitness(by_both) < 0.9 * evaluator.fitness(by_fitness)
    state, rows = first_state(space, 8, 32, evaluator, np.random.default_rng(0), 64)
    assert state.parent.tolist() == by_both.tolist()
    assert len(rows) == 3  # these two and the even one


@pytest.mark.parametrize("fitness", [math.nan, math.inf])
def test_a_level_that_breaks_the_model_is_not_chosen(fitness: float) -> None:
    space = make_space(BITS, [unit(i, 16) for i in range(4)], 2.5, "searches.x")
    alone = (*((unit, 2) for unit in range(4)), *((unit, 0) for unit in range(4)))
    effects = Effects(alone, (0.1, 0.2, 0.3, 0.4, fitness, 3.0, 4.0, 6.0), (math.nan,) * 8)
    _, by_both = measured_starts(space, effects)
    assert by_both[0] > 0 and space.fits(by_both)


def test_budget_is_not_spent_on_what_is_worse() -> None:
    """As where a model comes as Q4_1, which is all but exact, and worse at the larger Q5_0."""
    errors = {4: 0.001, 5: 0.002, 2: 0.03}
    units = tuple(
        Unit(f"{n}", n, "proj", "all", 8, tuple(Level(str(b), b, 8 * b, b, errors[b]) for b in (2, 4, 5)))
        for n in range(4)
    )
    space = make_space(BITS, units, 4.5, "searches.x")
    known = np.array([[errors[b] for b in (2, 4, 5)]] * 4)
    assert relaxed_least_error(space, known).tolist() == [1, 1, 1, 1]


def test_levels_of_several_variants_need_not_be_better_the_more_bytes_they_have() -> None:
    levels = (Level("3", 3, 3, 3, 0.02, "q"), Level("4", 4, 4, 4, 0.005, "q"), Level("0.5", 0.5, 9, 9, 0.06, "s"))
    units = tuple(Unit(f"{n}", n, "proj", "all", 8, levels) for n in range(6))
    space = make_space(BITS, units, 21 / 48, "searches.x")
    effects = Effects(tuple((unit, 0) for unit in range(6)), (0.001, 0.002, 0.003, 0.004, 5.0, 6.0), (math.nan,) * 6)
    (start,) = measured_starts(space, effects)
    assert start.tolist() == [0, 0, 0, 1, 1, 1]
