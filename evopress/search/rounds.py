"""Strategies that evaluate candidates by the model, round after round: what one has to answer, and how it is run.

A strategy makes a first state, then one state from another; everything else, from loading the model to going on after a
kill, is done for it, in one process or several. All processes run the same rounds with the same random numbers. Each
evaluates its share of the candidates, and the sums are exchanged, so all come to the same decisions; the first one
records them. A search that was killed goes on from its last round and ends with the same bytes.

Snakemake imports this module while it parses, so whatever takes long to import is imported inside functions.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from evopress.search.base import Fitness, Request, SeededStrategy
from evopress.util.progress import log, progress, stop_on_sigterm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import (
        CountingEvaluator,
        Effort,
        Evaluation,
        Evaluator,
        Minibatch,
        SearchResult,
        TraceRow,
    )
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.resume import ResumeFolder
    from evopress.search.selection import Round, State


class RoundStrategy(SeededStrategy):
    """A strategy that evaluates candidates by the model, round after round, and can be killed between any two of them.

    A round is what the resume log records: a generation of an evolution, a step of a greedy descent, a part of an
    enumeration. What a round does may depend on the state and the random numbers only: then a search that was killed
    goes on from its last round and ends with the same bytes, and all processes of a search decide alike.
    """

    keeps_the_best: ClassVar[bool] = False
    """Whether each round leaves the best candidate so far that meets the budget, so that its progress can be shown."""
    if TYPE_CHECKING:
        seed: int  # a field of the class that is made of this one

    def minimizes(self) -> Fitness:
        """What candidates are evaluated by."""
        raise NotImplementedError

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Make the state of round 0, and a row for each evaluation that led to it."""
        raise NotImplementedError

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Make the state of the next round, and a row for each evaluation that led to it."""
        raise NotImplementedError

    def remaining(self, state: "State", problem: "SearchProblem") -> int:
        """Rounds that are still to be made (an estimate, but 0 only at the end)."""
        raise NotImplementedError

    def workers(self, processes: int) -> int:
        """All of them: candidates are shared out."""
        return processes

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """What its first rounds ask for, run with random fitness."""
        return rehearse(self, problem, rng)

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Run all rounds, or those that are left where a killed search stopped; the best of the last state is found.

        Raises:
            ConfigError: the search text or the memory is too little.
            ArtifactError: tokens are missing, damaged or of another model.
            SearchError: no candidate has a fitness, or another process is gone.
        """
        from evopress.search.engine.evaluator import SearchEvaluator, require_tokens, search_text
        from evopress.search.progress import judge_progress

        tokens = search_text(context.run)
        require_tokens(self.tokens_asked(problem), tokens.numel(), problem.where)
        with stop_on_sigterm() as check:
            evaluator = SearchEvaluator(context, problem, tokens, self.minimizes(), check)
            started = time.monotonic()
            result = run_rounds(self, problem, evaluator, context.resume, context.name, check)
            if evaluator.counters.evaluations:
                log.info("search %s: %s", context.name, evaluator.counters.summary(time.monotonic() - started))
            if self.keeps_the_best:
                incumbents = context.resume.incumbents
                result = replace(result, progress=judge_progress(problem, incumbents, evaluator, *tokens.shape))
        return result


def run_rounds(
    strategy: RoundStrategy,
    problem: "SearchProblem",
    evaluator: "Evaluator",
    resume: "ResumeFolder",
    name: str,
    check: Callable[[], None],
) -> "SearchResult":
    """Run all rounds, or those that are left where a killed search stopped; the best of the last state is found.

    Args:
        strategy: makes the rounds.
        problem: is solved.
        evaluator: evaluates; asked only if a round is left.
        resume: records the rounds.
        name: of the search.
        check: called between rounds; raises if the search should stop.
    """
    import numpy as np

    from evopress.search.evaluation import CountingEvaluator, Effort

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
    state: "State",
    strategy: RoundStrategy,
    problem: "SearchProblem",
    evaluator: "CountingEvaluator",
    rng: "np.random.Generator",
    resume: "ResumeFolder",
    name: str,
    check: Callable[[], None],
    since: float,
) -> "State":
    """Make the rounds that are left; the first one's time counts from ``since``."""
    from evopress.search.evaluation import Effort

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


def _note(rows: "list[TraceRow]", spent: "Effort") -> str:
    """Fitness of the best new parent, and how fast tokens were evaluated."""
    best = min((row.fitness for row in rows if row.accepted), default=None)
    if best is None:
        return "no other candidate meets the budget" if not rows else ""
    return f"fitness {best:.4g}, {spent.tokens / max(spent.seconds, 1e-9):.3g} tokens/s"


# Rounds of a strategy without a model: what a search will have evaluated, drawn by the strategy's own code.

ROUNDS = 3
"""Rounds that are drawn, at most: the others will be like them."""


class Rehearsal:
    """An evaluator that notes what it is asked, and gives random numbers."""

    def __init__(self, rng: "np.random.Generator") -> None:
        self.rng = rng
        self.requests: list[Request] = []
        self._longest: dict[tuple[int, ...], int | None] = {}

    def draw(self, tokens: int, rng: "np.random.Generator", longest: int | None = None) -> "Minibatch":
        """A minibatch that is drawn again only from the same random state."""
        from evopress.search.evaluation import Minibatch

        minibatch = Minibatch((int(rng.integers(1 << 62)),), (tokens,))
        self._longest[minibatch.sequences] = longest
        return minibatch

    def evaluate(self, candidates: "NDArray[np.int16]", minibatch: "Minibatch") -> "list[Evaluation]":
        """A random fitness for each of ``candidates`` [C, units]."""
        from evopress.search.evaluation import Evaluation

        longest = self._longest[minibatch.sequences]
        self.requests.append(Request(candidates, minibatch.tokens, longest=longest, precise=minibatch.precise))
        drawn = self.rng.random((len(candidates), 2)).tolist()
        return [Evaluation(fitness, (fitness,), error) for fitness, error in drawn]

    def take(self, number: int) -> list[Request]:
        """What was asked since the last call, as of round ``number``."""
        taken, self.requests = self.requests, []
        return [replace(request, round=number) for request in taken]


def rehearse(strategy: RoundStrategy, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
    """What the first rounds ask for; those after the first, which may differ, stand for all that are left.

    What this one starts from may be unknown: any candidates take the place of what other searches have found, and
    random numbers that of single effects.
    """
    from evopress.search.candidates import random_candidate
    from evopress.search.sensitivity import single_effects

    evaluator = Rehearsal(rng.spawn(1)[0])
    unknown = [name for name in strategy.depends_on() if name not in problem.earlier]
    found = {name: random_candidate(problem.space, rng) for name in unknown}
    problem = replace(problem, earlier={**problem.earlier, **found})
    if (asked := strategy.effects()) is not None and problem.effects is None:
        made_up = single_effects(problem.space, 1, Rehearsal(rng.spawn(1)[0]), rng, asked.each)
        problem = replace(problem, effects=made_up)
    state, _ = strategy.first_round(problem, evaluator, rng)
    first, rounds, drawn = evaluator.take(0), list[Request](), 0
    while drawn < ROUNDS and strategy.remaining(state, problem):
        state, _ = strategy.next_round(state, problem, evaluator, rng)
        drawn += 1
        rounds += evaluator.take(drawn)
    times = 1 + strategy.remaining(state, problem) / max(1, drawn - 1)
    return first + [replace(request, times=times) if request.round > 1 or drawn == 1 else request for request in rounds]
