"""A strategy of one file: simulated annealing, which now and then goes on from a worse candidate.

The chain starts where an evolution starts and moves by the same level switches. The colder it is, the less a move may
raise the fitness. The population is the best candidate so far and the present one.
"""

import math
from typing import Literal

import numpy as np
from pydantic import Field

from evopress.search.candidates import initial_candidates, make_offspring
from evopress.search.evaluating import GroupedStrategy, OneTextStrategy
from evopress.search.evaluation import Evaluator, TraceRow
from evopress.search.problem import SearchProblem
from evopress.search.selection import Round, State, evaluate


class Annealing(OneTextStrategy, GroupedStrategy):
    """Simulated annealing: one candidate moves, and the colder it is the less it may get worse."""

    strategy: Literal["annealing"] = "annealing"
    moves: int = Field(100, ge=1, description="Level switches that are tried.")
    temperature: float = Field(0.01, gt=0, description="Rise in fitness that is likely at first; it falls to zero.")

    def first_round(self, problem: SearchProblem, evaluator: Evaluator, rng: np.random.Generator) -> Round:
        start = initial_candidates(problem.space, 1, rng)
        return State(0, np.vstack([start, start])), []

    def next_round(self, state: State, problem: SearchProblem, evaluator: Evaluator, rng: np.random.Generator) -> Round:
        moved = make_offspring(state.population[1], problem.space, 1, rng, switches=1)
        if not len(moved):
            return State(state.generation + 1, state.population, state.known), []
        known, minibatch = dict(state.known), evaluator.draw(self.tokens, rng)
        best, present, new = evaluate(np.vstack([state.population, moved]), minibatch, evaluator, known)
        heat = self.temperature * self.remaining(state, problem) / self.moves
        goes = rng.random() < math.exp(min(0.0, (present.fitness - new.fitness) / heat))
        chosen = [
            moved[0] if new.fitness < best.fitness else state.population[0],
            [*state.population, *moved][1 + goes],
        ]
        rows = [
            TraceRow(state.generation + 1, 0, number, minibatch, found.fitness, found.by_sequence, number == goes)
            for number, found in enumerate([present, new])
        ]
        return State(state.generation + 1, np.array(chosen, dtype=np.int16), known), rows

    def remaining(self, state: State, problem: SearchProblem) -> int:
        return self.moves - state.generation

    def sentence(self) -> str:
        return "found by simulated annealing"
