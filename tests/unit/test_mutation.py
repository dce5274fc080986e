"""Level switches and random starts, over random spaces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.search.candidates import (
    MOST_CHANGES,
    draw_switches,
    initial_candidates,
    make_offspring,
    mutate,
    switch_levels,
    uniform_start,
)
from evopress.search.space import Space, make_space


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Up to 12 units in up to 3 groups, with unlike sizes and levels, and any budget that some choice meets."""
    units = []
    for index in range(draw(st.integers(1, 12))):
        parameters = draw(st.integers(1, 40))
        bits = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=5)))
        levels = tuple(Level(str(b), float(b), b * parameters, b) for b in bits)
        units.append(Unit(f"u{index}", 0, f"l{index}", draw(st.sampled_from("abc")), parameters, levels))
    parameters = sum(unit.parameters for unit in units)
    low = sum(unit.levels[0].cost for unit in units)
    high = sum(unit.levels[-1].cost for unit in units)
    budget = draw(st.integers(low, high))
    # A target a little above budget / parameters, so that its floor is the budget.
    return make_space(BITS, units, round((budget + 0.5) / parameters, 6), "searches.x")


def even_space(count: int, bits=(2, 3, 4, 5), target=3.0, parameters=16) -> Space:
    levels = tuple(Level(str(b), float(b), b * parameters, b) for b in bits)
    units = [Unit(f"u{i}", i, "layer", "all", parameters, levels) for i in range(count)]
    return make_space(BITS, units, target, "searches.x")


def assert_valid(candidate: np.ndarray, space: Space) -> None:
    assert candidate.dtype == np.int16
    assert (candidate >= 0).all() and (candidate <= space.top).all()
    assert space.fits(candidate)


@settings(max_examples=150, deadline=None)
@given(spaces(), st.integers(0, 2**32))
def test_starts_and_offspring_keep_to_levels_groups_and_budget(space, seed):
    rng = np.random.default_rng(seed)
    starts = initial_candidates(space, 4, rng)
    for start in starts:
        assert_valid(start, space)
    children = make_offspring(starts[0], space, 6, rng)
    for child in children:
        assert_valid(child, space)
        assert (child != starts[0]).any()
    assert len(np.unique(children, axis=0)) == len(children) <= 6


@settings(max_examples=100, deadline=None)
@given(spaces(), st.integers(0, 2**32))
def test_starts_leave_no_slack_that_a_raise_fits_into(space, seed):
    for start in initial_candidates(space, 3, np.random.default_rng(seed)):
        if (start == uniform_start(space)).all():
            continue
        for members, budget in zip(space.members, space.group_budgets, strict=True):
            slack = budget - space.cost_of(start, members)
            free = members[start[members] < space.top[members]]
            assert all(space.costs[u, start[u] + 1] - space.costs[u, start[u]] > slack for u in free)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.integers(0, 2**32))
def test_equal_steps_trade_exactly_one_up_one_down(count, seed):
    space = even_space(count)
    rng = np.random.default_rng(seed)
    parent = uniform_start(space)
    child = switch_levels(parent, space, rng)
    assert sorted(child - parent) == [-1] + [0] * (count - 2) + [1]
    assert space.cost_of(child) == space.budget


def test_unequal_steps_spend_what_a_coarse_trade_leaves_over():
    space = even_space(6, bits=(2, 4, 8), target=4.0)
    parent = np.array([1, 1, 1, 1, 2, 0], dtype=np.int16)  # 4+4+4+4+8+2 > 24: not valid
    parent[0] = 0
    assert space.cost_of(parent) == 24 * 16
    rng = np.random.default_rng(0)
    slacks = [space.budget - space.cost_of(switch_levels(parent, space, rng)) for _ in range(300)]
    assert set(slacks) <= {0} and min(slacks) >= 0


def test_a_switch_touches_few_units_even_where_sizes_differ_much():
    big = tuple(Level(str(b), float(b), b * 1000, b) for b in (2, 3, 4))
    small = tuple(Level(str(b), float(b), b * 10, b) for b in (2, 3, 4))
    units = [Unit("big", 0, "big", "all", 1000, big)]
    units += [Unit(f"s{i}", 0, f"s{i}", "all", 10, small) for i in range(200)]
    space = make_space(BITS, units, 3.0, "searches.x")
    rng = np.random.default_rng(0)
    parent = uniform_start(space)
    made = [child for _ in range(200) if (child := switch_levels(parent, space, rng)) is not None]
    assert made and all(np.count_nonzero(child != parent) <= MOST_CHANGES for child in made)


def test_number_of_switches_has_the_distribution_of_the_paper():
    rng = np.random.default_rng(0)
    counts = np.bincount([draw_switches(rng) for _ in range(9000)], minlength=4)
    # min of two fair draws from 1..3: 5/9, 3/9, 1/9; the standard deviation of a count is at most 47.
    np.testing.assert_allclose(counts[1:], [5000, 3000, 1000], atol=200)
    assert counts[0] == 0


@pytest.mark.parametrize("switches", [1, 3, 7])
def test_switches_change_at_most_two_units_each(switches):
    space = even_space(40)
    rng = np.random.default_rng(1)
    changed = [np.count_nonzero(mutate(uniform_start(space), space, switches, rng) - 1) for _ in range(50)]
    assert 0 < max(changed) <= 2 * switches


def test_every_neighbour_is_found_where_there_are_few_and_none_twice():
    space = even_space(3, bits=(2, 3, 4))
    children = make_offspring(uniform_start(space), space, 100, np.random.default_rng(0))
    assert len(children) == len(np.unique(children, axis=0)) == 6  # the permutations of (2, 3, 4)


def test_no_choice_gives_no_offspring():
    assert len(make_offspring(np.zeros(1, np.int16), even_space(1, bits=(3,)), 5, np.random.default_rng(0))) == 0
    assert len(make_offspring(np.ones(1, np.int16), even_space(1), 5, np.random.default_rng(0))) == 0


def test_a_target_that_is_a_level_starts_uniform():
    assert initial_candidates(even_space(5), 8, np.random.default_rng(0)).tolist() == [[1] * 5]


def test_other_targets_start_from_distinct_mixtures_of_the_two_nearest_levels():
    space = even_space(8, target=3.3)
    starts = initial_candidates(space, 8, np.random.default_rng(0))
    assert len(np.unique(starts, axis=0)) == 8
    # floor(3.3 * 8 * 16) = 422 of 16 bits a step: two units at 4 bits, six at 3.
    assert all(sorted(start) == [1] * 6 + [2] * 2 for start in starts.tolist())


def test_the_same_seed_gives_the_same_offspring():
    space = even_space(20)
    first, second = (
        make_offspring(uniform_start(space), space, 10, np.random.Generator(np.random.PCG64(7))) for _ in range(2)
    )
    assert (first == second).all()


def test_offspring_come_from_every_parent_and_make_the_switches_asked_for():
    space = even_space(40)
    parents = np.stack([mutate(uniform_start(space), space, 30, np.random.default_rng(seed)) for seed in range(3)])
    children = make_offspring(parents, space, 90, np.random.default_rng(0), switches=1)
    distances = np.array([[np.count_nonzero(child != parent) for parent in parents] for child in children])
    assert (distances.min(axis=1) == 2).all()  # one raised, one lowered
    assert set(distances.argmin(axis=1).tolist()) == {0, 1, 2}
    far = make_offspring(parents[0], space, 30, np.random.default_rng(0), switches=7)
    assert np.mean([np.count_nonzero(child != parents[0]) for child in far]) > 8
