"""Searches over several variants at once: their spaces, moves and sums, on linear objectives without a model."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from evopress.compression.base import Level, Unit
from evopress.compression.families import DROP, KEEP
from evopress.search.budget import brought_to_budget, least_error, relaxed_least_error
from evopress.search.candidates import Move, make_offspring, switch_levels, uniform_starts
from evopress.search.moves import change_family, drop_module, exchange_modules, joint_move, restore_module
from evopress.search.sensitivity import Effects, measured_starts
from evopress.search.space import Candidate, Space, Work

SOURCES = {"gptq": (2, 3, 4, 6), "sparse": (3, 5)}
"""Bits that a weight takes at each level."""


def layer(block: int, name: str, weights: int, sources: dict[str, tuple[int, ...]] = SOURCES) -> Unit:
    levels = [
        Level(f"{source} {bits}", bits, bits * weights, bits * weights, source=source)
        for source, all_bits in sources.items()
        for bits in all_bits
    ]
    levels.sort(key=lambda level: level.bytes)
    return Unit(f"m.{block}.{name}", block, name, "all", weights, tuple(levels))


MULTIPLY_ADDS = {"attn": 8, "mlp": 10}
"""Of a module, for a token."""


def module(block: int, kind: str, dense: int = 0) -> Unit:
    levels = (Level(DROP, 1.0, 0, 0, source="drop"), Level(KEEP, 0.0, 1, dense, source="drop"))
    return Unit(f"m.{block}.{kind}", block, kind, "all", MULTIPLY_ADDS[kind], levels, ((block, kind),))


def space_of(blocks: int, budget: int, sources: dict[str, tuple[int, ...]] = SOURCES, dense: int = 0) -> Space:
    """Blocks of an attention (two layers) and an MLP (one)."""
    units = []
    for block in range(blocks):
        units += [module(block, "attn", dense), module(block, "mlp")]
        units += [layer(block, "self_attn.q", 4, sources), layer(block, "self_attn.o", 4, sources)]
        units += [layer(block, "mlp.up", 10, sources)]
    return Space(tuple(units), (budget,), in_bytes=True)


def slowed(space: Space, most: int) -> Space:
    """With a bound on multiply-adds, of which 5 lie outside of all modules."""
    return replace(space, work=Work(5 + sum(unit.parameters for unit in space.units if unit.modules), most))


def true_work(space: Space, candidate: Candidate) -> int:
    """Multiply-adds of what is left, module by module."""
    return 5 + sum(
        MULTIPLY_ADDS[unit.layer] for unit, at in zip(space.units, candidate, strict=True) if unit.modules and at
    )


def true_bytes(space: Space, candidate: Candidate) -> int:
    """Bytes of what is left, level by level."""
    gone = {m for unit, at in zip(space.units, candidate, strict=True) if not at for m in unit.modules}
    kinds = {"self_attn": "attn", "mlp": "mlp"}
    return sum(
        unit.levels[at].bytes
        for unit, at in zip(space.units, candidate, strict=True)
        if unit.modules or (unit.block, kinds[unit.layer.split(".")[0]]) not in gone
    )


def harms(space: Space, seed: int) -> np.ndarray:
    """Error of each level of each unit: falling with the bits among the levels of one source, any between sources."""
    rng, errors = np.random.default_rng(seed), np.full(space.costs.shape, np.inf)
    for number, unit in enumerate(space.units):
        if unit.modules:
            errors[number, :2] = rng.uniform(2, 40), 0.0
            continue
        for source in sorted({level.source for level in unit.levels}):
            scale, rate = rng.uniform(5, 60), rng.uniform(0.4, 0.9)
            for index, level in enumerate(unit.levels):
                if level.source == source:
                    errors[number, index] = scale * rate**level.value
    return errors


def total(space: Space, errors: np.ndarray, candidate: Candidate) -> float:
    """Sum of the errors of all that is left, and of what is dropped."""
    held = (space.holder >= 0) & (candidate[space.holder] == 0)
    return float(errors[np.arange(len(candidate)), candidate][~held].sum())


def optimum(space: Space, errors: np.ndarray) -> float:
    """By trying everything."""
    choices = [range(top + 1) for top in space.top]
    best = np.inf
    for chosen in product(*choices):
        candidate = np.array(chosen, dtype=np.int16)
        canonical = (space.canonical(candidate.copy()) == candidate).all()
        if canonical and candidate[space.modules].any() and space.fits(candidate):
            best = min(best, total(space, errors, candidate))
    return best


def test_a_candidate_costs_the_bytes_of_what_is_left() -> None:
    space = space_of(3, 300, dense=7)
    rng = np.random.default_rng(0)
    for _ in range(50):
        candidate = space.canonical(rng.integers(0, space.top, endpoint=True).astype(np.int16))
        assert space.cost_of(candidate) == true_bytes(space, candidate)
    everything = space.top.copy()
    assert space.limits() == [(2 * 10, true_bytes(space, everything))]  # an MLP at its lowest level, and all of it


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_errors_are_least_with_modules_and_several_sources(seed: int) -> None:
    space = space_of(2, 90, {"gptq": (2, 4), "sparse": (3,)})
    errors = harms(space, seed)
    best = optimum(space, errors)
    assert total(space, errors, least_error(space, errors, 10_000)) == pytest.approx(best)
    relaxed = relaxed_least_error(space, errors)
    assert space.fits(relaxed)
    assert (space.canonical(relaxed.copy()) == relaxed).all()
    assert total(space, errors, relaxed) <= 1.5 * best


@pytest.mark.parametrize(("harm", "dropped"), [(1e9, 0), (1e-9, 2)])
def test_measured_starts_drop_modules_that_do_little_and_keep_those_that_do_much(harm: float, dropped: int) -> None:
    space = space_of(2, 120)  # layers at their lowest levels take 72, at their highest 216
    alone = tuple((unit, 0) for unit in range(len(space.units)))
    effects = Effects(alone, tuple(harm if unit.modules else 1.0 for unit in space.units), ())
    for start in measured_starts(space, effects)[:-1]:  # in the last one, none goes where that is possible
        assert space.fits(start)
        assert np.count_nonzero(start[space.modules] == 0) == dropped


def test_moves_keep_the_budget_fill_it_and_leave_nothing_inside_dropped_modules() -> None:
    space, rng = space_of(4, 200, dense=3), np.random.default_rng(1)
    candidate = brought_to_budget(space.top, space, rng)
    seen = set()
    for _ in range(400):
        for move in (joint_move, change_family, drop_module, restore_module, exchange_modules):
            new = move(candidate, space, rng)
            if new is None:
                continue
            assert space.fits(new)
            assert (space.canonical(new.copy()) == new).all()
            assert new[space.modules].any()
            seen.add(move.__name__)
            candidate = new if rng.random() < 0.5 else candidate
    assert seen == {"joint_move", "change_family", "drop_module", "restore_module", "exchange_modules"}


def test_a_move_across_families_takes_a_neighbour_by_its_bytes() -> None:
    space = Space(tuple(layer(block, "mlp.up", 10) for block in range(3)), (150,), in_bytes=True)
    candidate = brought_to_budget(space.top, space, np.random.default_rng(0))
    labels = set()
    for seed in range(60):
        new = change_family(candidate, space, np.random.default_rng(seed))
        if new is None:
            continue
        for unit, before, after in zip(space.units, candidate, new, strict=True):
            if unit.levels[before].source != unit.levels[after].source:
                labels.add((unit.levels[before].label, unit.levels[after].label))
    assert labels
    neighbours = {
        ("gptq 2", "sparse 3"),
        ("gptq 3", "sparse 3"),
        ("gptq 3", "sparse 5"),
        ("gptq 4", "sparse 3"),
        ("gptq 4", "sparse 5"),
        ("gptq 6", "sparse 5"),
    }
    assert labels <= neighbours | {(new, old) for old, new in neighbours}


def with_dense_block(space: Space) -> Space:
    """The same where the layers of the first block have no levels."""
    return replace(space, units=tuple(unit for unit in space.units if unit.modules or unit.block > 0))


@pytest.mark.parametrize(
    ("most", "dense_block"), [(13, False), (41, False), (60, False), (76, False), (77, False), (15, True), (60, True)]
)
def test_a_bound_on_multiply_adds_holds_in_all_that_is_made(most: int, dense_block: bool) -> None:
    space, rng = space_of(4, 250, dense=3), np.random.default_rng(most)
    space = slowed(with_dense_block(space) if dense_block else space, most)
    errors = harms(space, 0)
    made = [brought_to_budget(space.top, space, rng) for _ in range(20)]
    made += [least_error(space, errors, 1000), relaxed_least_error(space, errors)]
    candidate = made[0]
    for _ in range(400):
        for move in (joint_move, restore_module, exchange_modules):
            new = move(candidate, space, rng)
            if new is not None:
                made.append(new)
                candidate = new
    assert max(true_work(space, one) for one in made) <= most
    moved = {unit for one in made for unit in np.flatnonzero(one != candidate)}
    assert most < 41 or moved.issuperset(space.modules)  # those that hold no layers as well
    assert all(space.fits(one) and one[space.modules].any() for one in made)
    assert not space.fits(np.ones_like(space.top)) or most == 77


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_errors_are_near_the_least_under_both_bounds(seed: int) -> None:
    space = space_of(2, 90, {"gptq": (2, 4), "sparse": (3,)})
    errors = harms(space, seed)
    needs = true_work(space, least_error(space, errors, 10_000))
    bounded = slowed(space, needs - 1)
    best = optimum(bounded, errors)
    assert best > optimum(space, errors)
    for found in (least_error(bounded, errors, 10_000), relaxed_least_error(bounded, errors)):
        assert bounded.fits(found)
        assert best <= total(space, errors, found) + 1e-9 <= 1.6 * best


def above_the_optimum(seed: int, generations: int, move: Move, most: int | None = None) -> float:
    """By what share the best candidate of an evolution is worse than the optimum of a linear objective.

    With a bound on multiply-adds, worse than what the relaxation of that finds.
    """
    space = space_of(6, 330)
    space = space if most is None else slowed(space, most)
    errors, rng = harms(space, seed), np.random.default_rng(seed)
    parent = brought_to_budget(space.top, space, rng)
    for _ in range(generations):
        children = make_offspring(parent, space, 32, rng, move=move)
        parent = min([parent, *children], key=lambda each: total(space, errors, each))
    return total(space, errors, parent) / total(space, errors, least_error(space, errors, 10_000)) - 1


def test_moves_find_the_optimum_of_linear_objectives() -> None:
    found = [above_the_optimum(seed, 400, joint_move) for seed in range(5)]
    assert sum(gap < 1e-9 for gap in found) >= 4
    assert max(found) < 0.02  # errors of modules are drawn as large as those of all their layers: a rugged landscape


def test_moves_find_no_less_than_a_relaxation_under_both_bounds() -> None:
    assert max(above_the_optimum(seed, 400, joint_move, most=80) for seed in range(3)) < 0.02


def test_switches_alone_do_not() -> None:
    assert above_the_optimum(0, 400, switch_levels) > 0.8


def test_each_of_several_variants_has_a_uniform_start() -> None:
    space = space_of(2, 6 * 36, {"gptq": (2, 4, 6), "sparse": (3, 5)})
    starts = uniform_starts(space)
    sources = [{unit.levels[at].source for unit, at in zip(space.units, start, strict=True)} for start in starts]
    assert sources == [{"drop", "gptq"}, {"drop", "sparse"}]
    assert all(space.fits(start) for start in starts)
    assert uniform_starts(replace(space, group_budgets=(2 * 36 - 1,))) == []


def test_the_last_module_stays() -> None:
    space = space_of(2, 30)
    errors = harms(space, 0)
    errors[space.modules, 0] = 0.0
    for candidate in (least_error(space, errors, 100), relaxed_least_error(space, errors)):
        assert candidate[space.modules].sum() >= 1
        assert space.fits(candidate)
