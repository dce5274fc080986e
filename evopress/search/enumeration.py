"""Judging a given list of candidates on the same tokens, a part a round; the best one is found."""

import numpy as np
from numpy.typing import NDArray

from evopress.search.evolution.generations import State, require_number, select_next
from evopress.search.evolution.selection import Evaluator, Known, Step, select
from evopress.search.rounds import Round, Rounds


def enumeration(candidates: NDArray[np.int16], part: int, tokens: int, seed: int) -> Rounds:
    """Rounds that judge all of ``candidates`` [C, units], ``part`` of them at a time.

    Judgements are comparable across rounds: every round draws the tokens anew with the same seed. In the trace, the
    rows of a round that are numbered from 0 are its candidates, in order.
    """
    steps, parts = [Step(1, tokens)], -(-len(candidates) // part)

    def again() -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(seed))

    def start(evaluator: Evaluator, rng: np.random.Generator) -> Round:
        known: Known = {}
        chosen = select(candidates[:part], None, steps, evaluator, known, again(), generation=0)
        require_number(chosen.judgement.fitness)
        return State(0, chosen.winners, known), chosen.rows

    def advance(state: State, evaluator: Evaluator, rng: np.random.Generator) -> Round:
        first = (state.generation + 1) * part
        return select_next(state, candidates[first : first + part], steps, evaluator, again())

    return Rounds(start, advance, lambda state: parts - 1 - state.generation, seed, "parts")


def fitness_of_each(records: list[dict]) -> NDArray[np.float64]:
    """Fitness of each candidate of an enumeration, [C], from its trace."""
    return np.array([record["fitness"] for record in records if record["candidate"] >= 0])
