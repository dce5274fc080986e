"""The (1 + lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1), one generation at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from evopress.search.evolution.earlier import within_budget
from evopress.search.evolution.initial import initial_candidates
from evopress.search.evolution.mutation import make_offspring
from evopress.search.evolution.selection import Evaluator, Known, Step, select
from evopress.search.evolution.sensitivity import measured_starts
from evopress.search.record.trace import TraceRow
from evopress.search.space import Candidate, Space
from evopress.util.errors import SearchError


@dataclass(frozen=True)
class State:
    """All that the next generation depends on, beside the random state."""

    generation: int
    """Generations that are finished."""
    population: NDArray[np.int16]
    """[P, units], best first."""
    known: Known = field(default_factory=dict)
    """All judgements of candidates so far: none is made again where the very same tokens are drawn."""

    @property
    def parent(self) -> Candidate:
        """The best of the population, [units]."""
        return self.population[0]


def first_state(
    space: Space,
    candidates: int,
    tokens: int,
    evaluator: Evaluator,
    rng: np.random.Generator,
    sensitivity_tokens: int | None = None,
    population: int = 1,
    earlier: Sequence[Candidate] = (),
) -> tuple[State, list[TraceRow]]:
    """Start from the even candidate, or from the best of random ``candidates`` on ``tokens`` tokens.

    With ``sensitivity_tokens``, starts from measured sensitivities are compared with these; so are ``earlier``
    candidates, brought to the budget where they miss it.
    """
    starts = initial_candidates(space, candidates, rng)
    rows: list[TraceRow] = []
    if sensitivity_tokens is not None:
        measured, rows = measured_starts(space, sensitivity_tokens, evaluator, rng)
        starts = np.vstack([starts, *measured])
    starts = np.unique(np.vstack([starts, *(within_budget(candidate, space, rng) for candidate in earlier)]), axis=0)
    if len(starts) == 1:
        return State(0, starts), rows
    known: Known = {}
    chosen = select(starts, None, [Step(population, tokens)], evaluator, known, rng, generation=0)
    require_number(chosen.judgement.fitness)
    step = 1 if rows else 0
    return State(0, chosen.winners, known), [*rows, *(replace(row, step=step) for row in chosen.rows)]


def next_generation(
    state: State,
    space: Space,
    offspring: int,
    steps: Sequence[Step],
    evaluator: Evaluator,
    rng: np.random.Generator,
    switches: int | None = None,
) -> tuple[State, list[TraceRow]]:
    """Mutate the population and select the next one.

    Returns:
        The new state, and a row for each judgement (none if no other candidate meets the budget).

    Raises:
        SearchError: no candidate has a fitness that is a number.
    """
    children = make_offspring(state.population, space, offspring, rng, switches)
    return select_next(state, children, steps, evaluator, rng)


def select_next(
    state: State, children: NDArray[np.int16], steps: Sequence[Step], evaluator: Evaluator, rng: np.random.Generator
) -> tuple[State, list[TraceRow]]:
    """Select the next population from ``children`` [n, units] and the present one.

    Returns:
        The new state, and a row for each judgement (none without children).

    Raises:
        SearchError: no candidate has a fitness that is a number.
    """
    generation = state.generation + 1
    if not len(children):
        return State(generation, state.population, state.known), []
    known = dict(state.known)
    chosen = select(children, state.population, steps, evaluator, known, rng, generation)
    require_number(chosen.judgement.fitness)
    return State(generation, chosen.winners, known), chosen.rows


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
