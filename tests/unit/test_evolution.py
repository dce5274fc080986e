"""Selection and the evolutionary loop on toy objectives: no model, no bits."""

import json
import zlib

import numpy as np
import pytest
from toy_search import first_state, next_generation

from evopress.compression.base import Level, Unit
from evopress.compression.families import BITS
from evopress.search.candidates import make_offspring, uniform_start
from evopress.search.evaluation import PARENT, Evaluation, draw_minibatch
from evopress.search.problem import SearchProblem
from evopress.search.resume import ResumeFolder
from evopress.search.selection import State, Step, select
from evopress.search.sensitivity import most_promising
from evopress.search.space import Space, make_space
from evopress.search.strategies.evolution import Evolution
from evopress.util.errors import SearchError


class Linear:
    """Fitness is a weighted sum of levels, plus noise that shrinks with the number of tokens."""

    def __init__(self, weights, noise=0.0, sequences=64, length=16):
        self.weights, self.noise, self.sequences, self.length = np.asarray(weights), noise, sequences, length
        self.calls: list[tuple[int, int]] = []

    def draw(self, tokens, rng, longest=None):
        return draw_minibatch(tokens, self.sequences, self.length, rng)

    def evaluate(self, candidates, minibatch):
        self.calls.append((len(candidates), minibatch.tokens))
        exact = candidates @ self.weights
        seeds = [zlib.crc32(candidate.tobytes() + repr(minibatch).encode()) for candidate in candidates]
        noise = [np.random.default_rng(seed).normal() * self.noise / minibatch.tokens**0.5 for seed in seeds]
        return [
            Evaluation(float(value + extra), (float(value + extra),)) for value, extra in zip(exact, noise, strict=True)
        ]


def bit_strings(units: int, ones: int) -> Space:
    """Each unit is dropped (0) or kept (1), with exactly ``ones`` kept."""
    levels = (Level("0", 0.0, 0, 0), Level("1", 1.0, 1, 1))
    made = [Unit(f"u{i}", i, "layer", "all", 1, levels) for i in range(units)]
    return make_space(BITS, made, ones / units + 1e-6, "searches.x")


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_the_optimum_of_a_linear_objective_is_found():
    weights = np.arange(20.0)
    space, evaluator, source = bit_strings(20, 12), Linear(weights), rng()
    state, _ = first_state(space, 8, 16, evaluator, source)
    for _ in range(60):
        state, _ = next_generation(state, space, 16, [Step(1, 16)], evaluator, source)
    assert state.parent.tolist() == [1] * 12 + [0] * 8  # the twelve cheapest
    assert state.generation == 60


def test_fitness_never_rises_without_noise():
    space, evaluator, source = bit_strings(16, 8), Linear(np.random.default_rng(3).random(16)), rng()
    state, rows = first_state(space, 4, 16, evaluator, source)
    best = [next(row.fitness for row in rows if row.accepted)]
    for _ in range(20):
        state, rows = next_generation(state, space, 6, [Step(3, 16), Step(1, 64)], evaluator, source)
        best.append(next(row.fitness for row in rows if row.accepted))
    assert best == sorted(best, reverse=True)


def test_offspring_are_those_of_which_single_steps_promise_most():
    weights = np.random.default_rng(5).random(12)
    levels = tuple(Level(str(i), float(i), i, i) for i in range(4))
    space = make_space(BITS, [Unit(f"u{i}", i, "layer", "all", 1, levels) for i in range(12)], 2, "searches.x")
    parent, source, evaluator = np.full(12, 2, dtype=np.int16), rng(), Linear(weights)
    pool = make_offspring(parent, space, 200, source)
    far = parent.copy()
    far[[0, 1]] = 0, 3  # what two levels at once do is not known, however good
    chosen = most_promising(parent, np.vstack([far, pool]), 5, space, 64, evaluator, source)
    assert evaluator.calls == [(25, 64)]  # the parent, and each unit a level above and below
    near = pool[(np.abs(pool - parent) <= 1).all(axis=1)]
    best = near[np.argsort(near @ weights, kind="stable")[:5]]
    assert np.array_equal(chosen, best)
    assert np.array_equal(most_promising(parent, far[None], 5, space, 64, evaluator, source), far[None])


def test_promising_offspring_find_the_optimum_in_fewer_generations():
    weights = np.random.default_rng(2).random(40)
    space = bit_strings(40, 20)
    problem = SearchProblem(space, BITS, "x", "searches.x")
    settings = {"strategy": "evolution", "variants": "x", "target": 3, "offspring": 8, "survivors": [1], "tokens": [16]}

    def generations(**more):
        strategy, evaluator, source = Evolution(**settings, **more), Linear(weights), rng(1)
        state, optimum = State(0, space.top[None] * (np.arange(40) < 20).astype(np.int16)), np.sort(weights)[:20].sum()
        while state.parent @ weights > optimum + 1e-9 and state.generation < 300:
            state, rows = strategy.next_round(state, problem, evaluator, source)
            assert {row.generation for row in rows} == {state.generation}
        return state.generation

    assert generations(step_tokens=16) < generations() / 3


def test_steps_narrow_the_field_and_admit_the_parent_last():
    space, evaluator = bit_strings(12, 6), Linear(np.ones(12), noise=1.0)
    parent = first_state(space, 2, 16, evaluator, rng())[0].parent
    evaluator.calls.clear()
    state = State(0, parent[None])
    steps = [Step(5, 32), Step(2, 100), Step(1, 512)]
    _, rows = next_generation(state, space, 9, steps, evaluator, rng(1))
    assert evaluator.calls == [(9, 32), (5, 100), (3, 512)]
    by_step = [[row for row in rows if row.step == step] for step in range(3)]
    assert [len(step) for step in by_step] == [9, 5, 3]
    for earlier, later, step in zip(by_step, by_step[1:], steps, strict=False):
        best = sorted(earlier, key=lambda row: row.fitness)[: step.survivors]
        assert {row.candidate for row in later} - {PARENT} == {row.candidate for row in best}
    assert [row.candidate for row in rows if row.candidate == PARENT] == [PARENT]
    assert by_step[2][0].candidate == PARENT
    winner = min(by_step[2], key=lambda row: row.fitness)
    assert [row.candidate for row in rows if row.accepted] == [winner.candidate]
    assert len({row.minibatch for row in rows}) == 3


def test_a_population_keeps_several_parents_and_mutates_them_all():
    space, evaluator, source = bit_strings(20, 12), Linear(np.arange(20.0)), rng()
    state, rows = first_state(space, 8, 16, evaluator, source, population=3)
    assert state.population.shape == (3, 20) and sum(row.accepted for row in rows) == 3
    parents = {parent.tobytes() for parent in state.population}
    steps = [Step(4, 16), Step(3, 16)]
    state, rows = next_generation(state, space, 12, steps, evaluator, source)
    last = [row for row in rows if row.step == 1]
    assert [row.candidate for row in last[:3]] == [PARENT, PARENT - 1, PARENT - 2]
    assert {np.array(row.levels, np.int16).tobytes() for row in last[:3]} == parents
    best = sorted(row.fitness for row in last)[:3]
    assert sorted(row.fitness for row in rows if row.accepted) == best
    assert (state.population @ evaluator.weights).tolist() == best  # best first
    for _ in range(80):
        state, _ = next_generation(state, space, 12, steps, evaluator, source)
    assert state.parent.tolist() == [1] * 12 + [0] * 8


def test_the_parent_wins_ties_and_nan_never_wins():
    parent = np.array([1, 0, 1, 0], dtype=np.int16)
    children = np.array([[0, 1, 1, 0], [0, 1, 0, 1]], dtype=np.int16)
    chosen = select(children, parent[None], [Step(1, 16)], Linear(np.zeros(4)), {}, rng(), 1)
    assert (chosen.winners == parent).all()
    broken = Linear(np.array([np.nan, 1, 1, 1]))
    assert chosen.rows[0].candidate == PARENT
    assert select(children, None, [Step(1, 16)], broken, {}, rng(), 1).winners.tolist()  # all NaN: reported by the loop
    with pytest.raises(SearchError, match="NaN"):
        next_generation(State(0, parent[None]), bit_strings(4, 2), 3, [Step(1, 16)], broken, rng())


def test_a_candidate_is_not_judged_twice_on_the_same_tokens():
    space, evaluator = bit_strings(10, 5), Linear(np.arange(10.0), sequences=4, length=16)
    source, state = rng(), State(0, np.array([[0] * 5 + [1] * 5], dtype=np.int16))
    everything, seen = 64, set()
    for _ in range(40):
        evaluator.calls.clear()
        state, rows = next_generation(state, space, 4, [Step(2, everything), Step(1, everything)], evaluator, source)
        # Both steps see all tokens: survivors, parents and offspring that were rejected before are known.
        levels = {row.levels for row in rows}
        assert sum(count for count, _ in evaluator.calls) == len(levels - seen)
        assert len(rows) == 4 + 3
        seen |= levels
    assert len(evaluator.calls) < 2


def test_nor_where_the_same_tokens_are_drawn_by_chance_some_generations_later():
    space, evaluator = bit_strings(6, 3), Linear(np.arange(6.0), sequences=3, length=16)
    source, state = rng(), State(0, np.array([[0] * 3 + [1] * 3], dtype=np.int16))
    seen, repeated = set(), 0
    for _ in range(30):
        evaluator.calls.clear()
        state, rows = next_generation(state, space, 4, [Step(2, 16), Step(1, 32)], evaluator, source)
        judged = {(row.levels, row.minibatch) for row in rows}
        assert sum(count for count, _ in evaluator.calls) == len(judged - seen)
        assert {row.remembered for row in rows if (row.levels, row.minibatch) in seen} <= {True}
        repeated += len(judged & seen)
        seen |= judged
    assert repeated > 50


def test_no_other_candidate_leaves_the_parent_without_judging():
    space, evaluator = bit_strings(3, 3), Linear(np.ones(3))
    state, rows = next_generation(State(4, np.ones((1, 3), np.int16)), space, 8, [Step(1, 16)], evaluator, rng())
    assert state.generation == 5 and rows == [] and evaluator.calls == []


def test_minibatches_hold_exactly_the_tokens_asked_for():
    source = rng()
    for tokens in (1, 15, 16, 17, 100, 160):
        batch = draw_minibatch(tokens, 10, 16, source)
        assert batch.tokens == tokens == sum(batch.lengths)
        assert len(set(batch.sequences)) == len(batch.sequences) and max(batch.sequences) < 10
        assert all(length == 16 for length in batch.lengths[:-1]) and 0 < batch.lengths[-1] <= 16
        covered = [position for start, end, _ in batch.segments() for position in range(start, end)]
        assert covered == list(range(len(batch.lengths)))
        assert all({*batch.lengths[start:end]} == {length} for start, end, length in batch.segments())
    assert draw_minibatch(160, 10, 16, source) == draw_minibatch(160, 10, 16, source)


def test_tokens_may_be_spread_over_pieces_of_many_sequences():
    assert draw_minibatch(24, 10, 16, rng(), longest=4).lengths == (4,) * 6
    assert draw_minibatch(6, 10, 16, rng(), longest=4).lengths == (4, 2)
    assert draw_minibatch(60, 10, 16, rng(), longest=4).lengths == (6,) * 10  # no more sequences: longer pieces
    assert draw_minibatch(32, 10, 16, rng(), longest=64).lengths == (16, 16)


def test_all_sequences_are_drawn_equally_often():
    source = rng()
    counts = np.bincount([s for _ in range(2000) for s in draw_minibatch(48, 8, 16, source).sequences], minlength=8)
    np.testing.assert_allclose(counts, 750, atol=100)  # five standard deviations


def run_with_restarts(folder, stops, generations=12):
    """Search, forgetting everything but the resume folder after each generation in ``stops``."""
    space, evaluator, _ = problem()
    resume, source = ResumeFolder(folder, "digest"), rng(5)
    state, rows = first_state(space, 4, 32, evaluator, source)
    resume.save(state, source, rows)
    return go_on(resume, source, stops, generations)


def problem():
    evaluator = Linear(np.arange(14.0), noise=5.0, sequences=8)
    return bit_strings(14, 7), evaluator, [Step(3, 40), Step(1, 128)]


def go_on(resume, source, stops=(), generations=12):
    space, evaluator, steps = problem()
    state = resume.load(source)
    while state.generation < generations:
        if state.generation in stops:
            resume, source = ResumeFolder(resume.folder, "digest"), rng(99)
            state = resume.load(source)
        state, rows = next_generation(state, space, 5, steps, evaluator, source)
        resume.save(state, source, rows)
    return state.parent.tolist(), json.dumps(resume.result(state).records)


def test_restarts_change_nothing(tmp_path):
    plain = run_with_restarts(tmp_path / "a", stops=())
    assert run_with_restarts(tmp_path / "b", stops=(0, 3, 4, 9, 11)) == plain


def shown(known):
    """What can be compared: an error that is not known is NaN, which differs from itself."""
    return {key: repr(evaluation) for key, evaluation in known.items()}


@pytest.mark.parametrize("tokens", [(16, 64), (64, 64)], ids=["random", "all"])
def test_known_judgements_survive_a_restart_exactly(tmp_path, tokens):
    space, evaluator = bit_strings(10, 5), Linear(np.arange(10.0) / 3, noise=1.0, sequences=4)
    resume, source = ResumeFolder(tmp_path, "digest"), rng()
    state, rows = first_state(space, 4, 32, evaluator, source)
    resume.save(state, source, rows)
    for _ in range(6):
        state, rows = next_generation(state, space, 4, [Step(2, tokens[0]), Step(1, tokens[1])], evaluator, source)
        resume.save(state, source, rows)
        again = rng(1)
        loaded = resume.load(again)
        assert loaded.generation == state.generation and loaded.parent.dtype == np.int16
        assert loaded.parent.tolist() == state.parent.tolist()
        assert shown(loaded.known) == shown(state.known) and len(loaded.known) >= 3
        assert again.bit_generator.state == source.bit_generator.state


def test_each_generation_appends_to_the_log_and_a_cut_last_line_is_dropped(tmp_path):
    whole = run_with_restarts(tmp_path / "whole", stops=())
    log = tmp_path / "whole" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 13 and max(map(len, lines)) < 2 * min(map(len, lines[2:]))
    for cut in (0, 1, len(lines[6]) // 2, len(lines[6]) - 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "log.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:cut])
        source = rng(99)
        resume = ResumeFolder(folder, "digest")
        assert resume.load(source).generation == 4
        assert (folder / "log.jsonl").read_bytes() == b"".join(lines[:6])
        assert go_on(resume, source) == whole


def test_generations_that_two_jobs_wrote_are_taken_once(tmp_path):
    whole = run_with_restarts(tmp_path, stops=())
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:6], *lines[4:9]]))
    source, resume = rng(99), ResumeFolder(tmp_path, "digest")
    assert resume.load(source).generation == 7
    assert go_on(resume, source) == whole


@pytest.mark.parametrize("damage", ["digest", "header alone", "cut header", "a changed bit", "nothing there"])
def test_a_resume_folder_that_does_not_fit_is_not_used(tmp_path, damage):
    resume, source = ResumeFolder(tmp_path / "resume", "digest"), rng()
    if damage != "nothing there":
        resume.save(State(0, uniform_start(bit_strings(4, 2))[None]), source, [])
    log = tmp_path / "resume" / "log.jsonl"
    if damage == "digest":
        resume = ResumeFolder(tmp_path / "resume", "other settings")
    elif damage == "header alone":
        log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    elif damage == "cut header":
        log.write_bytes(log.read_bytes()[:10])
    elif damage == "a changed bit":
        content = bytearray(log.read_bytes())
        content[-20] ^= 1
        log.write_bytes(content)
    before = source.bit_generator.state
    assert resume.load(source) is None
    assert source.bit_generator.state == before


def test_a_damaged_generation_is_made_again(tmp_path):
    whole = run_with_restarts(tmp_path / "whole", stops=())
    lines = (tmp_path / "whole" / "log.jsonl").read_bytes().splitlines(keepends=True)
    damaged = lines[4].replace(b'"fitness": ', b'"fitness": 1', 1)
    assert damaged != lines[4]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "log.jsonl").write_bytes(b"".join([*lines[:4], damaged, *lines[5:]]))
    assert go_on(ResumeFolder(tmp_path / "damaged", "digest"), rng()) == whole


def test_a_job_goes_on_when_another_has_ended_the_same_search_and_removed_its_log(tmp_path):
    first, second = (ResumeFolder(tmp_path / "resume", "digest") for _ in range(2))
    state = State(0, uniform_start(bit_strings(4, 2))[None])
    source = rng()
    first.save(state, source, [])
    assert second.load(source).generation == 0
    first.remove()
    second.save(State(1, state.population), source, [])
    assert second.load(source).generation == 1
