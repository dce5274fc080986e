"""A start from measured sensitivities: what each unit's compression alone costs the model.

Beyond the paper, and off by default. To first order the divergence of a compressed model is a sum of what each unit's
compression costs alone (the linearity theorem of HIGGS, arXiv 2411.17525). Seen from a model that is already
compressed, such a cost drowns in the noise of all the other errors; seen from the dense model, few tokens show it
clearly. It is seen more clearly still in the final hidden states, whose error has less noise than a divergence but
says less of what matters, so each gives a start. Layer errors only give the shape of a unit's levels around the one
that is measured: as costs they choose badly. What the sums miss is left to the evolution, which goes on from the best
of these and the uniform start.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from evopress.search.budget import relaxed_least_error
from evopress.search.candidates import uniform_start
from evopress.search.evaluation import Evaluator, TraceRow
from evopress.search.selection import each_alone, evaluate
from evopress.search.space import DENSE_LEVEL, Candidate, Space

PIECES = 16
"""Sequences over which the tokens are spread on which units are evaluated alone ..."""
PIECE = 32
"""... if each then gives at least so many; few tokens come from fewer."""
LEAST = 1e-12
"""An effect that is measured as less than this is taken for noise."""


def measured_starts(
    space: Space, tokens: int, evaluator: Evaluator, rng: np.random.Generator
) -> tuple[list[Candidate], list[TraceRow]]:
    """Candidates of least predicted harm, and the evaluations (generation 0, step 0) that the prediction rests on.

    Each unit with a choice is evaluated alone (`each_at_its_level`), on pieces of many sequences, so that no one text
    decides. One candidate is of least summed effect on the fitness; another, where errors of final hidden states are
    known, of least summed error.

    Returns:
        The candidates, the one by fitness first.
    """
    candidates, changes = each_at_its_level(space)
    minibatch = evaluator.draw(tokens, rng, max(PIECE, tokens // PIECES))
    evaluations = evaluate(candidates, minibatch, evaluator, {})
    rows = [
        TraceRow(0, 0, number, minibatch, found.fitness, found.by_sequence, False, tuple(candidate.tolist()))
        for number, (candidate, found) in enumerate(zip(candidates, evaluations, strict=True))
    ]
    by_fitness = [found.fitness - evaluations[0].fitness for found in evaluations[1:]]
    by_error = [found.hidden_error for found in evaluations[1:]]
    known = [effects for effects in (by_fitness, by_error) if np.isfinite(effects).all()]
    return [_least_effect(space, changes, effects) for effects in known or [by_fitness]], rows


def each_at_its_level(space: Space) -> tuple[NDArray[np.int16], dict[int, int]]:
    """The dense model, and each unit with a choice alone at its uniform level, all others dense.

    Returns:
        Candidates [1 + n, units], and the level of each of the n units.
    """
    uniform = np.minimum(uniform_start(space), space.top).tolist()
    shapes = [_shape(space, unit) for unit in range(len(space.units))]
    # Where the uniform level does no harm (a module kept, a layer whole), the lowest shows what the unit is worth.
    changes = {
        unit: uniform[unit] if shapes[unit][uniform[unit]] > 0 else 0 for unit in np.flatnonzero(space.top > 0).tolist()
    }
    dense = np.full(len(space.units), DENSE_LEVEL, dtype=np.int16)
    return np.vstack([dense, each_alone(dense, list(changes), list(changes.values()))]), changes


def _least_effect(space: Space, changes: Mapping[int, int], effects: Sequence[float]) -> Candidate:
    """Candidate of least summed effect, from what each unit's level in ``changes`` was measured to do alone."""
    known = np.zeros(space.costs.shape)
    for (unit, level), effect in zip(changes.items(), effects, strict=True):
        shape = _shape(space, unit)
        known[unit, : len(shape)] = max(effect, LEAST) * (shape / shape[level] if shape[level] > 0 else shape)
    return relaxed_least_error(space, known)


def _shape(space: Space, unit: int) -> NDArray[np.float64]:
    """Effect of each level as a share of the lowest level's, from layer errors; without them, from costs."""
    levels = space.units[unit].levels
    heights = np.array([level.error for level in levels])
    if not np.isfinite(heights).all() or heights[0] <= heights[-1]:
        costs = np.array([level.cost for level in levels], dtype=np.float64)
        heights = costs[-1] - costs
    return (heights / heights[0]).clip(0.0) if heights[0] > 0 else np.zeros(len(levels))
