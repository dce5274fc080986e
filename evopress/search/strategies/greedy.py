"""Greedy descent on the measured fitness.

Every unit starts at its dearest level. In each round every unit that can still go down a level, in a group that is
over its budget, is judged with that one step taken; the steps that raise the fitness least for the cost that they save
are taken. For depth pruning with one step a round this is the greedy removal of modules, one after the other, each time
the one whose loss changes the output least (compare FinerCut, arXiv 2405.18218).

Where costs differ, the last step may save more than it has to; what is then free is spent the same way, upwards.
"""

import math

import numpy as np
from numpy.typing import NDArray

from evopress.search.context import Context, Found
from evopress.search.engine.objectives import Fitness
from evopress.search.evolution.generations import State, require_number
from evopress.search.evolution.selection import Evaluator, judge
from evopress.search.record.trace import PARENT, TraceRow
from evopress.search.rounds import Round, Rounds, search_by_model
from evopress.search.settings import GreedySettings
from evopress.search.space import Candidate, Space


def greedy(context: Context[GreedySettings]) -> Found | None:
    """Descend to the budget.

    Raises:
        ConfigError: the text or the memory is too little.
        ArtifactError: tokens or variants are missing, damaged or of another model.
        SearchError: no candidate has a fitness.
    """
    settings = context.settings
    fitness = Fitness(settings.fitness, settings.top_k)
    return search_by_model(context, descent(context.space, settings), fitness, settings.tokens_asked())


def descent(space: Space, settings: GreedySettings) -> Rounds:
    """The search, a judgement of all possible steps a round."""

    def start(evaluator: Evaluator, rng: np.random.Generator) -> Round:
        return State(0, space.top[None]), []

    def advance(state: State, evaluator: Evaluator, rng: np.random.Generator) -> Round:
        return step(state, space, settings.tokens, settings.per_round, evaluator, rng)

    return Rounds(start, advance, lambda state: rounds_left(space, state.parent, settings.per_round), settings.seed)


def step(state: State, space: Space, tokens: int, most: int, evaluator: Evaluator, rng: np.random.Generator) -> Round:
    """Judge every possible step of one unit on the same tokens, and take the best ones, at most ``most``.

    Returns:
        The new state, and a row for each judgement: the candidate before the step as the parent, and the first of the
        steps that are taken as accepted.

    Raises:
        SearchError: no step has a fitness.
    """
    current, way = state.parent, direction(space, state.parent)
    units = np.flatnonzero(possible(space, current, way))
    moved = np.repeat(current[None], len(units), axis=0)
    moved[np.arange(len(units)), units] += way
    minibatch = evaluator.draw(tokens, rng)
    judged = judge(np.vstack([current[None], moved]), minibatch, evaluator, {})
    fitness = np.array([judgement.fitness for judgement in judged])
    saved = np.abs(space.costs[units, current[units]] - space.costs[units, current[units] + way])
    order = np.argsort((fitness[1:] - fitness[0]) / np.maximum(saved, 1), kind="stable")  # NaN last
    require_number(float(fitness[1:][order[0]]))
    new = current.copy()
    for unit in units[order[:most]]:
        if possible(space, new, way)[unit]:
            new[unit] += way
    rows = [
        TraceRow(
            generation=state.generation + 1,
            step=0,
            candidate=PARENT if number == 0 else number - 1,
            minibatch=minibatch,
            fitness=found.fitness,
            fitness_by_sequence=found.by_sequence,
            accepted=number == order[0] + 1,
        )
        for number, found in enumerate(judged)
    ]
    return State(state.generation + 1, new[None]), rows


def direction(space: Space, candidate: Candidate) -> int:
    """Down (-1) until the budget holds, then up."""
    return 1 if space.fits(candidate) else -1


def possible(space: Space, candidate: Candidate, way: int) -> NDArray[np.bool_]:
    """Which units may go a level down, or up, [units]: down where their group exceeds its budget, up within it."""
    slack = np.array(space.group_budgets)
    for group, members in enumerate(space.members):
        slack[group] -= space.cost_of(candidate, members)
    room = slack[space.group_of]
    if way < 0:
        return (candidate > 0) & (room < 0)
    above = np.minimum(candidate + 1, space.top)
    units = np.arange(len(candidate))
    return (candidate < space.top) & (space.costs[units, above] - space.costs[units, candidate] <= room)


def rounds_left(space: Space, candidate: Candidate, most: int) -> int:
    """Rounds that are still needed: 0 at the end, else about as many as steps of mean cost fit into the excess."""
    if space.fits(candidate):
        return int(possible(space, candidate, 1).any())
    steps = 0.0
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        span = space.costs[members, space.top[members]] - space.costs[members, 0]
        mean = max(1.0, float(span.sum()) / max(1, int(space.top[members].sum())))
        steps += max(0, space.cost_of(candidate, members) - budget) / mean
    return max(1, math.ceil(steps / most))
