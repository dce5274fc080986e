"""Rounds of a strategy without a model: what a search will have evaluated, drawn by the strategy's own code.

Selection needs a fitness, which is drawn at random: which candidates survive changes what is evaluated, but hardly how
much of it they share.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evopress.search.base import Request, RoundStrategy
from evopress.search.candidates import random_candidate
from evopress.search.evaluation import Evaluation, Minibatch
from evopress.search.problem import SearchProblem

ROUNDS = 4
"""Rounds that are drawn, at most: the others will be like them."""


class Rehearsal:
    """An evaluator that notes what it is asked, and gives random numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.requests: list[Request] = []
        self._longest: dict[tuple[int, ...], int | None] = {}

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """A minibatch that is drawn again only from the same random state."""
        minibatch = Minibatch((int(rng.integers(1 << 62)),), (tokens,))
        self._longest[minibatch.sequences] = longest
        return minibatch

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """A random fitness for each of ``candidates`` [C, units]."""
        longest = self._longest[minibatch.sequences]
        self.requests.append(Request(candidates, minibatch.tokens, longest=longest, precise=minibatch.precise))
        drawn = self.rng.random((len(candidates), 2)).tolist()
        return [Evaluation(fitness, (fitness,), error) for fitness, error in drawn]

    def take(self, number: int) -> list[Request]:
        """What was asked since the last call, as of round ``number``."""
        taken, self.requests = self.requests, []
        return [replace(request, round=number) for request in taken]


def rehearse(strategy: RoundStrategy, problem: SearchProblem, rng: np.random.Generator) -> list[Request]:
    """What the first rounds ask for; those after the first, which may differ, stand for all that are left.

    What searches have found that this one depends on may be unknown: any candidates take their place.
    """
    evaluator = Rehearsal(rng.spawn(1)[0])
    unknown = [name for name in strategy.depends_on() if name not in problem.earlier]
    found = {name: random_candidate(problem.space, rng) for name in unknown}
    problem = replace(problem, earlier={**problem.earlier, **found})
    state, _ = strategy.first_round(problem, evaluator, rng)
    first, rounds, drawn = evaluator.take(0), list[Request](), 0
    while drawn < ROUNDS and strategy.remaining(state, problem):
        state, _ = strategy.next_round(state, problem, evaluator, rng)
        drawn += 1
        rounds += evaluator.take(drawn)
    times = 1 + strategy.remaining(state, problem) / max(1, drawn - 1)
    return first + [replace(request, times=times) if request.round > 1 or drawn == 1 else request for request in rounds]
