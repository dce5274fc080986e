"""Running a strategy of rounds on the model and the search text, in one process or several.

All processes run the same rounds with the same random numbers. Each evaluates its share of the candidates, and the sums
are exchanged, so all come to the same decisions; the first one records them. A search that was killed goes on from its
last round and ends with the same bytes.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from evopress.search.engine.evaluator import require_tokens, search_text
from evopress.search.engine.precision import SearchEvaluator
from evopress.search.evaluation import CountingEvaluator, Effort, Evaluator, SearchResult, TraceRow
from evopress.search.problem import SearchContext, SearchProblem
from evopress.search.resume import ResumeFolder
from evopress.search.selection import State
from evopress.util.progress import log, progress
from evopress.util.termination import stop_on_sigterm

if TYPE_CHECKING:
    from evopress.search.base import RoundStrategy


def search_in_rounds(strategy: "RoundStrategy", context: SearchContext, problem: SearchProblem) -> SearchResult:
    """Run a strategy.

    Raises:
        ConfigError: the search text or the memory is too little.
        ArtifactError: tokens are missing, damaged or of another model.
        SearchError: no candidate has a fitness, or another process is gone.
    """
    tokens = search_text(context.run)
    require_tokens(strategy.tokens_asked(problem), tokens.numel(), problem.where)
    with stop_on_sigterm() as check:
        evaluator = SearchEvaluator(context, problem, tokens, strategy.minimizes(), check)
        started = time.monotonic()
        result = run_rounds(strategy, problem, evaluator, context.resume, context.name, check)
    if evaluator.counters.evaluations:
        log.info("search %s: %s", context.name, evaluator.counters.summary(time.monotonic() - started))
    return result


def run_rounds(
    strategy: "RoundStrategy",
    problem: SearchProblem,
    evaluator: Evaluator,
    resume: ResumeFolder,
    name: str,
    check: Callable[[], None],
) -> SearchResult:
    """Run all rounds, or those that are left where a killed search stopped; the best of the last state is found.

    Args:
        strategy: makes the rounds.
        problem: is solved.
        evaluator: evaluates; asked only if a round is left.
        resume: records the rounds.
        name: of the search.
        check: called between rounds; raises if the search should stop.
    """
    started = time.monotonic()
    rng = np.random.Generator(np.random.PCG64(strategy.seed))
    state = resume.load(rng)
    if state is not None:
        log.info("search %s: goes on after round %d", name, state.generation)
    if state is None or strategy.remaining(state, problem):
        counting = CountingEvaluator(evaluator)
        if state is None:
            state, rows = strategy.first_round(problem, counting, rng)
            resume.save(state, rng, rows, Effort(counting.tokens, time.monotonic() - started))
            started = time.monotonic()
        state = _go_on(state, strategy, problem, counting, rng, resume, name, check, started)
    return resume.result(state)


def _go_on(
    state: State,
    strategy: "RoundStrategy",
    problem: SearchProblem,
    evaluator: CountingEvaluator,
    rng: np.random.Generator,
    resume: ResumeFolder,
    name: str,
    check: Callable[[], None],
    since: float,
) -> State:
    """Make the rounds that are left; the first one's time counts from ``since``."""
    with progress(f"search {name}", strategy.remaining(state, problem), strategy.rounds) as bar:
        while strategy.remaining(state, problem):
            check()
            before = evaluator.tokens
            state, rows = strategy.next_round(state, problem, evaluator, rng)
            now = time.monotonic()
            spent = Effort(evaluator.tokens - before, now - since)
            resume.save(state, rng, rows, spent)
            since = now
            bar.advance(note=_note(rows, spent))
    return state


def _note(rows: list[TraceRow], spent: Effort) -> str:
    """Fitness of the best new parent, and how fast tokens were evaluated."""
    best = min((row.fitness for row in rows if row.accepted), default=None)
    if best is None:
        return "no other candidate meets the budget" if not rows else ""
    return f"fitness {best:.4g}, {spent.tokens / max(spent.seconds, 1e-9):.3g} tokens/s"
