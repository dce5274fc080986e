"""A start from measured sensitivities: what each unit's compression alone costs the model.

Beyond the paper, and off by default. To first order the divergence of a compressed model is a sum of what each unit's
compression costs alone (the linearity theorem of HIGGS, arXiv 2411.17525). Seen from a model that is already
compressed, such a cost drowns in the noise of all the other errors; seen from the dense model, few tokens show it
clearly. It is seen more clearly still in the final hidden states, whose error has less noise than a divergence but
says less of what matters, so each gives a start. Layer errors only give the shape of a unit's levels around the one
that is measured: as costs they choose badly. What the sums miss is left to the evolution, which goes on from the best
of these and the even start.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evopress.search.evolution.initial import even_candidate
from evopress.search.evolution.selection import Evaluator, judge
from evopress.search.record.trace import TraceRow
from evopress.search.space import DENSE_LEVEL, Candidate, Space

Effects = NDArray[np.float64]
"""Rise in fitness by each level of each unit alone, [units, most levels]; 0 for units without a choice."""
PIECES = 16
"""Sequences over which the tokens are spread on which units are judged alone ..."""
PIECE = 32
"""... if each then gives at least so many; few tokens come from fewer."""
LEAST = 1e-12
"""An effect that is measured as less than this is taken for noise."""
HALVINGS = 100
"""Steps of the bisection for the price of a unit of cost."""


def measured_starts(
    space: Space, tokens: int, evaluator: Evaluator, rng: np.random.Generator
) -> tuple[list[Candidate], list[TraceRow]]:
    """Candidates of least predicted harm, and the judgements (generation 0, step 0) that the prediction rests on.

    Each unit with a choice is judged at its even level, all others dense, on pieces of many sequences, so that no one
    text decides. One candidate is of least summed effect on the fitness; another, where errors of final hidden states
    are known, of least summed error.

    Returns:
        The candidates, the one by fitness first.
    """
    shapes = [_shape(space, unit) for unit in range(len(space.units))]
    even = np.minimum(even_candidate(space), space.top).tolist()
    # Where the even level does no harm (a module kept, a layer whole), the lowest shows what the unit is worth.
    changes = {
        unit: even[unit] if shapes[unit][even[unit]] > 0 else 0 for unit in np.flatnonzero(space.top > 0).tolist()
    }
    candidates = np.full((len(changes) + 1, len(space.units)), DENSE_LEVEL, dtype=np.int16)
    for row, (unit, level) in enumerate(changes.items(), start=1):
        candidates[row, unit] = level
    minibatch = evaluator.draw(tokens, rng, max(PIECE, tokens // PIECES))
    judged = judge(candidates, minibatch, evaluator, {})
    rows = [
        TraceRow(0, 0, number, minibatch, found.fitness, found.by_sequence, False, tuple(candidate.tolist()))
        for number, (candidate, found) in enumerate(zip(candidates, judged, strict=True))
    ]
    by_fitness = [found.fitness - judged[0].fitness for found in judged[1:]]
    by_error = [found.hidden_error for found in judged[1:]]
    known = [effects for effects in (by_fitness, by_error) if np.isfinite(effects).all()]
    return [_allocated(space, shapes, changes, effects) for effects in known or [by_fitness]], rows


def _allocated(
    space: Space, shapes: Sequence[NDArray[np.float64]], changes: Mapping[int, int], effects: Sequence[float]
) -> Candidate:
    """Candidate of least summed effect, from what each unit's level in ``changes`` was measured to do alone."""
    known = np.zeros(space.costs.shape)
    for (unit, level), effect in zip(changes.items(), effects, strict=True):
        shape = shapes[unit]
        known[unit, : len(shape)] = max(effect, LEAST) * (shape / shape[level] if shape[level] > 0 else shape)
    return allocate(space, known)


def _shape(space: Space, unit: int) -> NDArray[np.float64]:
    """Effect of each level as a share of the lowest level's, from layer errors; without them, from costs."""
    levels = space.units[unit].levels
    heights = np.array([level.error for level in levels])
    if not np.isfinite(heights).all() or heights[0] <= heights[-1]:
        costs = np.array([level.cost for level in levels], dtype=np.float64)
        heights = costs[-1] - costs
    return (heights / heights[0]).clip(0.0) if heights[0] > 0 else np.zeros(len(levels))


def allocate(space: Space, effects: Effects) -> Candidate:
    """Levels of least summed effect within each group's budget (Lagrangian relaxation, then greedy filling)."""
    candidate = np.zeros(len(space.units), dtype=np.int16)
    for members, budget in zip(space.members, space.group_budgets, strict=True):
        candidate[members] = _cheapest(space, effects, members, budget)
        _fill(candidate, space, effects, members, budget)
    return candidate


def _cheapest(space: Space, effects: Effects, members: NDArray[np.int64], budget: int) -> Candidate:
    """Best levels at the lowest price per unit of cost at which the budget holds."""
    costs, known = space.costs[members].astype(np.float64), effects[members]
    beyond = np.arange(costs.shape[1]) > space.top[members, None]
    low, high = -60.0, 20.0  # powers of ten
    best = np.zeros(len(members), dtype=np.int16)
    for _ in range(HALVINGS):
        price = 10.0 ** ((low + high) / 2)
        levels = np.where(beyond, np.inf, known + price * costs).argmin(axis=1).astype(np.int16)
        if space.costs[members, levels].sum() <= budget:
            best, high = levels, (low + high) / 2
        else:
            low = (low + high) / 2
    return best


def _fill(candidate: Candidate, space: Space, effects: Effects, members: NDArray[np.int64], budget: int) -> None:
    """Raise in place, best gain per cost first, while a step fits."""
    while True:
        slack = budget - space.cost_of(candidate, members)
        units = members[candidate[members] < space.top[members]]
        steps = space.costs[units, candidate[units] + 1] - space.costs[units, candidate[units]]
        units, steps = units[steps <= slack], steps[steps <= slack]
        if not len(units):
            return
        gains = effects[units, candidate[units]] - effects[units, candidate[units] + 1]
        candidate[units[np.argmax(gains / np.maximum(steps, 1))]] += 1
