"""Multi-step selection: few tokens for many candidates, many tokens for the few that are left.

arXiv 2410.14649, algorithm 1: each step draws fresh tokens; parents are admitted to the last step only, so they are
compared where the evaluation is surest. Beyond the paper, and off by default, an offspring may have to be better than
the parent beyond chance (`surely_best`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evopress.search.evaluation import PARENT, Evaluation, Evaluator, Minibatch, TraceRow
from evopress.search.space import Candidate
from evopress.util.errors import SearchError
from evopress.util.metrics import error_of_mean

PIECES = 8
"""Sequences over which the last step's tokens are spread, at least, where confidence is asked for."""
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
    confidence: float = 0.0,
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
        confidence: that an offspring which takes the place of a parent is better (`surely_best`); 0 asks for none.

    Raises:
        SearchError: the text has too few sequences for any confidence.
    """
    older = {} if parents is None else {PARENT - index: parent for index, parent in enumerate(parents)}
    left, rows = list(range(len(offspring))), []
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        compared = last and confidence > 0  # between sequences, of which there should be several
        minibatch = evaluator.draw(step.tokens, rng, -(-step.tokens // PIECES) if compared else None)
        if last:
            left = [*older, *left]
        candidates = np.array([offspring[i] if i >= 0 else older[i] for i in left], dtype=np.int16)
        remembered = [(candidate.tobytes(), minibatch) in known for candidate in candidates]
        found = evaluate(candidates, minibatch, evaluator, known)
        # Stable, with NaN last: of equals the first stays, and parents come first.
        order = np.argsort([evaluation.fitness for evaluation in found], kind="stable")[: step.survivors]
        if compared and older:
            order = surely_best(found, len(older), step.survivors, minibatch, confidence)
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


def surely_best(
    found: Sequence[Evaluation], parents: int, survivors: int, minibatch: Minibatch, confidence: float
) -> NDArray[np.int64]:
    """Which evaluations to keep where an offspring must be better than the parent whose place it takes beyond chance.

    Differences are paired: both were evaluated on the same sequences. An offspring replaces the worst parent that is
    left if a one-sided t test on the differences of the sequences rejects that it is no better, at a chance of error
    of (1 - ``confidence``) / offspring. So, as far as these differences are normal, a parent that is better than all
    of its offspring is replaced with probability 1 - ``confidence`` at most, however many they are.

    Args:
        found: evaluations on ``minibatch``, those of the ``parents`` first.
        parents: how many.
        survivors: how many are kept.
        minibatch: the tokens.
        confidence: above 0, below 1.

    Returns:
        Indices of those that are kept, the best first.

    Raises:
        SearchError: the minibatch has one sequence only.
    """
    if len(minibatch.sequences) < 2:
        raise SearchError(
            "confidence: differences are compared between sequences, and the search text has only one; set "
            "data.search.tokens to more than data.search.sequence_length, or confidence to 0"
        )
    fitness = np.array([evaluation.fitness for evaluation in found])
    order = np.argsort(fitness, kind="stable")
    old, offspring = order[order < parents].tolist()[:survivors], order[order >= parents].tolist()
    new: list[int] = []
    for number in offspring:
        if len(old) + len(new) < survivors:
            new.append(number)
        elif old and _no_better(found[number], found[old[-1]], minibatch) <= (1 - confidence) / len(offspring):
            old.pop()
            new.append(number)
    kept = np.array(sorted([*old, *new]))  # of equals, parents come first
    return kept[np.argsort(fitness[kept], kind="stable")]


def _no_better(offspring: Evaluation, parent: Evaluation, minibatch: Minibatch) -> float:
    """How probable so good a result is for an offspring that is no better than its parent."""
    if math.isnan(parent.fitness):
        return 1.0 if math.isnan(offspring.fitness) else 0.0
    lengths = np.array(minibatch.lengths)
    gains = np.array(parent.by_sequence) - np.array(offspring.by_sequence)
    gain, error = float(lengths / minibatch.tokens @ gains), error_of_mean(gains, lengths)
    if error == 0.0:
        return 0.0 if gain > 0 else 1.0
    return t_tail(gain / error, len(gains) - 1)


def t_tail(t: float, degrees: int) -> float:
    """Probability that Student's t exceeds ``t``, or NaN for NaN.

    With t = sqrt(degrees) tan(angle), the density is that of cos(angle) to the power of degrees - 1.
    """
    steps = 4096
    start = math.atan(t / math.sqrt(degrees))
    upper, whole = (
        float(np.trapezoid(np.cos(np.linspace(first, math.pi / 2, steps)) ** (degrees - 1)) * (math.pi / 2 - first))
        for first in (start, -math.pi / 2)
    )
    return upper / whole


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
    state: State,
    offspring: NDArray[np.int16],
    steps: Sequence[Step],
    evaluator: Evaluator,
    rng: np.random.Generator,
    confidence: float = 0.0,
) -> Round:
    """Select the next population from ``offspring`` [n, units] and the present one, with some ``confidence``.

    Returns:
        The new state, and a row for each evaluation (none without offspring).

    Raises:
        SearchError: no candidate has a fitness that is a number, or there is too little text for any confidence.
    """
    generation = state.generation + 1
    if not len(offspring):
        return State(generation, state.population, state.known), []
    known = dict(state.known)
    chosen = select(offspring, state.population, steps, evaluator, known, rng, generation, confidence)
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
