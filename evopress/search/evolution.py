"""The (1 + lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1), one generation at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evopress.errors import SearchError
from evopress.search.initial import initial_candidates
from evopress.search.minibatch import Minibatch
from evopress.search.mutation import make_offspring
from evopress.search.selection import Evaluator, Judgement, Known, Selection, Step, select
from evopress.search.space import Candidate, Space
from evopress.search.trace import TraceRow


@dataclass(frozen=True)
class State:
    """All that the next generation depends on, beside the random state."""

    generation: int
    """Generations that are finished."""
    parent: Candidate
    known: dict[Minibatch, Judgement] = field(default_factory=dict)
    """What the last generation found of the parent; spares judging it again where the same tokens are drawn."""


def first_state(
    space: Space, candidates: int, tokens: int, evaluator: Evaluator, rng: np.random.Generator
) -> tuple[State, list[TraceRow]]:
    """Start from the even candidate, or from the best of random ``candidates`` on ``tokens`` tokens."""
    starts = initial_candidates(space, candidates, rng)
    if len(starts) == 1:
        return State(0, starts[0]), []
    chosen = select(starts, None, [Step(1, tokens)], evaluator, {}, rng, generation=0)
    _require_number(chosen)
    return State(0, chosen.winner), chosen.rows


def next_generation(
    state: State,
    space: Space,
    offspring: int,
    steps: Sequence[Step],
    evaluator: Evaluator,
    rng: np.random.Generator,
) -> tuple[State, list[TraceRow]]:
    """Mutate the parent and select the next one.

    Returns:
        The new state, and a row for each judgement (none if no other candidate meets the budget).

    Raises:
        SearchError: no candidate has a fitness that is a number.
    """
    generation = state.generation + 1
    children = make_offspring(state.parent, space, offspring, rng)
    if not len(children):
        return State(generation, state.parent, state.known), []
    known: Known = {(state.parent.tobytes(), minibatch): found for minibatch, found in state.known.items()}
    chosen = select(children, state.parent, steps, evaluator, known, rng, generation)
    _require_number(chosen)
    drawn = {row.minibatch for row in chosen.rows}
    winner = chosen.winner.tobytes()
    kept = {batch: found for (candidate, batch), found in known.items() if candidate == winner and batch in drawn}
    return State(generation, chosen.winner, kept), chosen.rows


def _require_number(chosen: Selection) -> None:
    if math.isnan(chosen.judgement.fitness):
        raise SearchError(
            "the fitness of every candidate is NaN: the model's activations overflow in its dtype, or its variants "
            "hold NaN; remake the variants, or set model.dtype to bfloat16 or float32"
        )
