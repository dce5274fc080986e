"""Strategies that judge candidates by the model, round after round, and can be killed between any two of them.

A round is what the resume folder records: a generation of an evolution, a step of a greedy descent, a part of an
enumeration. Whatever the strategy, a search that was killed goes on from its last round and ends with the same bytes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from evopress.search.context import Context, Found
from evopress.search.engine.evaluator import open_evaluator, require_tokens, search_text
from evopress.search.engine.forward import Check
from evopress.search.engine.objectives import Fitness
from evopress.search.evolution.generations import State
from evopress.search.evolution.selection import Evaluator
from evopress.search.processes.cooperation import Leader, follow
from evopress.search.processes.termination import stop_on_sigterm
from evopress.search.record.effort import Counted, Effort
from evopress.search.record.resume import ResumeFolder
from evopress.search.record.trace import TraceRow
from evopress.util.progress import log, progress

Round = tuple[State, list[TraceRow]]
"""State after a round, and the judgements that led to it."""


@dataclass(frozen=True)
class Rounds:
    """A strategy as its rounds. What each does may depend on the state and the random numbers only."""

    start: Callable[[Evaluator, np.random.Generator], Round]
    """Makes the state of generation 0."""
    advance: Callable[[State, Evaluator, np.random.Generator], Round]
    """Makes the state of the next generation."""
    left: Callable[[State], int]
    """Rounds that are still to be made (an estimate, but 0 only at the end)."""
    seed: int = 0
    unit: str = "rounds"


def search_by_model(context: Context, rounds: Rounds, fitness: Fitness, asked: Mapping[str, int]) -> Found | None:
    """Run a strategy on the model and the search text, in one process or several.

    Args:
        context: the search.
        rounds: the strategy.
        fitness: what candidates are judged by.
        asked: tokens that one judgement takes, by the setting that asks for them.

    Returns:
        None in a process that only helps the first.

    Raises:
        ConfigError: the search text or the memory is too little.
        ArtifactError: tokens are missing, damaged or of another model.
    """
    tokens, ranks = search_text(context.run), context.ranks
    require_tokens(asked, tokens.numel(), context.where)
    with stop_on_sigterm() as check:
        leader = Leader(ranks, lambda: open_evaluator(context, tokens, fitness, check))
        if ranks.rank > 0:
            follow(ranks, leader.make_evaluator)
            return None
        if ranks.count == 1:
            return run_rounds(rounds, leader.make_evaluator, context.resume, context.name, check)
        found = run_rounds(rounds, leader.prepare, context.resume, context.name, check)
        leader.stop()
        return found


def run_rounds(
    rounds: Rounds, make_evaluator: Callable[[], Evaluator], resume: ResumeFolder, name: str, check: Check
) -> Found:
    """Run all rounds, or those that are left where a killed search stopped; the best of the last state is found."""
    started = time.monotonic()
    rng = np.random.Generator(np.random.PCG64(rounds.seed))
    state = resume.load(rng)
    if state is not None:
        log.info("search %s: goes on after round %d", name, state.generation)
    if state is None or rounds.left(state):
        evaluator = Counted(make_evaluator())
        if state is None:
            state, rows = rounds.start(evaluator, rng)
            resume.save(state, rng, rows, Effort(evaluator.tokens, time.monotonic() - started))
            started = time.monotonic()
        state = _go_on(state, rounds, evaluator, rng, resume, name, check, started)
    return Found(state.parent, resume.records(state.generation), resume.effort(state.generation))


def _go_on(
    state: State,
    rounds: Rounds,
    evaluator: Counted,
    rng: np.random.Generator,
    resume: ResumeFolder,
    name: str,
    check: Check,
    since: float,
) -> State:
    """Make the rounds that are left; the first one's time counts from ``since``."""
    with progress(f"search {name}", rounds.left(state), rounds.unit) as bar:
        while rounds.left(state):
            check()
            before = evaluator.tokens
            state, rows = rounds.advance(state, evaluator, rng)
            now = time.monotonic()
            spent = Effort(evaluator.tokens - before, now - since)
            resume.save(state, rng, rows, spent)
            since = now
            bar.advance(note=_note(rows, spent))
    return state


def _note(rows: list[TraceRow], spent: Effort) -> str:
    """Fitness of the best new parent, and how fast tokens were judged."""
    best = min((row.fitness for row in rows if row.accepted), default=None)
    if best is None:
        return "no other candidate meets the budget" if not rows else ""
    return f"fitness {best:.4g}, {spent.tokens / max(spent.seconds, 1e-9):.3g} tokens/s"
