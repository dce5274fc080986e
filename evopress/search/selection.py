"""Multi-step selection: few tokens for many candidates, many tokens for the few that are left.

arXiv 2410.14649, algorithm 1: each step draws fresh tokens; parents are admitted to the last step only, so they are
compared where the evaluation is surest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evopress.search.evaluation import PARENT, Evaluation, Evaluator, Minibatch, TraceRow
from evopress.search.space import Candidate
from evopress.util.errors import SearchError

Known = dict[tuple[bytes, Minibatch], Evaluation]
"""Evaluations made so far, by candidate and tokens."""


@dataclass(frozen=True)
class State:
    """All that the next round depends on, beside the random state."""

    generation: int
    """Rounds that are finished."""
    population: NDArray[np.int16]
    """[P, units], best first."""
    known: Known = field(default_factory=dict)
    """All evaluations of candidates so far: none is made again where the very same tokens are drawn."""

    @property
    def parent(self) -> Candidate:
        """The best of the population, [units]."""
        return self.population[0]


Round = tuple[State, list[TraceRow]]
"""State after a round, and the evaluations that led to it."""


@dataclass(frozen=True)
class Step:
    """One selection step."""

    survivors: int
    tokens: int


@dataclass(frozen=True)
class Selection:
    """The winners, and each evaluation that led to them."""

    winners: NDArray[np.int16]
    """[survivors of the last step, units], best first."""
    evaluation: Evaluation
    """Of the best."""
    rows: list[TraceRow]


def select(
    offspring: NDArray[np.int16],
    parents: NDArray[np.int16] | None,
    steps: Sequence[Step],
    evaluator: Evaluator,
    known: Known,
    rng: np.random.Generator,
    generation: int,
) -> Selection:
    """Choose the best of ``offspring`` [n, units] and ``parents``.

    Args:
        offspring: distinct candidates.
        parents: [P, units], admitted to the last step, where they win ties; None if there are none.
        steps: tokens and survivors; those of the last step are the next parents.
        evaluator: evaluates.
        known: evaluations that need not be made again; those made here are added.
        rng: draws the minibatches.
        generation: for the trace.
    """
    older = {} if parents is None else {PARENT - index: parent for index, parent in enumerate(parents)}
    left, rows = list(range(len(offspring))), []
    for number, step in enumerate(steps):
        minibatch = evaluator.draw(step.tokens, rng)
        last = number == len(steps) - 1
        if last:
            left = [*older, *left]
        candidates = np.array([offspring[i] if i >= 0 else older[i] for i in left], dtype=np.int16)
        remembered = [(candidate.tobytes(), minibatch) in known for candidate in candidates]
        found = evaluate(candidates, minibatch, evaluator, known)
        # Stable, with NaN last: of equals the first stays, and parents come first.
        order = np.argsort([evaluation.fitness for evaluation in found], kind="stable")[: step.survivors]
        rows += [
            TraceRow(
                generation=generation,
                step=number,
                candidate=i,
                minibatch=minibatch,
                fitness=evaluation.fitness,
                fitness_by_sequence=evaluation.by_sequence,
                accepted=last and k in order,
                levels=tuple(candidates[k].tolist()),
                remembered=remembered[k],
            )
            for k, (i, evaluation) in enumerate(zip(left, found, strict=True))
        ]
        left = sorted(left[k] for k in order)
    return Selection(candidates[order], found[order[0]], rows)


def evaluate(
    candidates: NDArray[np.int16], minibatch: Minibatch, evaluator: Evaluator, known: Known
) -> list[Evaluation]:
    """Evaluate candidates together, except those that were evaluated on the very same tokens before."""
    keys = [(candidate.tobytes(), minibatch) for candidate in candidates]
    new = [index for index, key in enumerate(keys) if key not in known]
    if new:
        found = evaluator.evaluate(candidates[new], minibatch)
        known.update({keys[index]: evaluation for index, evaluation in zip(new, found, strict=True)})
    return [known[key] for key in keys]


def first_selection(starts: NDArray[np.int16], step: Step, evaluator: Evaluator, rng: np.random.Generator) -> Round:
    """The first population: the best of ``starts`` [n, units].

    Raises:
        SearchError: no candidate has a fitness that is a number.
    """
    known: Known = {}
    chosen = select(starts, None, [step], evaluator, known, rng, generation=0)
    require_number(chosen.evaluation.fitness)
    return State(0, chosen.winners, known), chosen.rows


def select_next(
    state: State, offspring: NDArray[np.int16], steps: Sequence[Step], evaluator: Evaluator, rng: np.random.Generator
) -> Round:
    """Select the next population from ``offspring`` [n, units] and the present one.

    Returns:
        The new state, and a row for each evaluation (none without offspring).

    Raises:
        SearchError: no candidate has a fitness that is a number.
    """
    generation = state.generation + 1
    if not len(offspring):
        return State(generation, state.population, state.known), []
    known = dict(state.known)
    chosen = select(offspring, state.population, steps, evaluator, known, rng, generation)
    require_number(chosen.evaluation.fitness)
    return State(generation, chosen.winners, known), chosen.rows


def each_alone(
    base: Candidate, units: Sequence[int] | NDArray[np.int64], levels: Sequence[int] | NDArray[np.integer]
) -> NDArray[np.int16]:
    """Candidates like ``base`` [units] but for one unit each: that one of ``units`` [n] at that one of ``levels`` [n].

    Returns:
        [n, units].
    """
    candidates = np.repeat(base[None], len(units), axis=0)
    candidates[np.arange(len(units)), units] = levels
    return candidates


def require_number(fitness: float) -> None:
    """Refuse a selection whose best candidate has no ``fitness``.

    Raises:
        SearchError: it says what to do.
    """
    if math.isnan(fitness):
        raise SearchError(
            "the fitness of every candidate is NaN: the model's activations overflow in its dtype, or its variants "
            "hold NaN; remake the variants, or set model.dtype to bfloat16 or float32"
        )
