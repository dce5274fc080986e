"""What each unit's compression alone costs the model, and a start from that.

Effects of single units are small: where the model works in 16 bits, rounding its hidden states costs more than the
compression of most layers. They are measured in float32 (`SingleEffects`).

The start is beyond the paper, and off by default. To first order the divergence of a compressed model is a sum of what
each unit's compression costs alone (the linearity theorem of HIGGS, arXiv 2411.17525). Seen from a model that is
already compressed, such a cost drowns in the noise of all the other errors; seen from the dense model, few tokens show
it clearly. It is seen more clearly still in the final hidden states, whose error has less noise than a divergence but
says less of what matters, so each gives a start. Layer errors only give the shape of a unit's levels around the one
that is measured: as costs they choose badly. What the sums miss is left to the evolution, which goes on from the best
of these and the uniform start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evopress.models.modules import OUTER
from evopress.search.budget import relaxed_least_error
from evopress.search.candidates import uniform_start
from evopress.search.evaluation import Evaluation, Evaluator, Minibatch, TraceRow
from evopress.search.selection import each_alone, evaluate
from evopress.search.space import DENSE_LEVEL, Candidate, Space

PIECES = 16
"""Sequences over which the tokens are spread on which units are evaluated alone ..."""
PIECE = 32
"""... if each then gives at least so many; few tokens come from fewer."""
LEAST = 1e-12
"""An effect that is measured as less than this is taken for noise."""


def piece_length(tokens: int) -> int:
    """Tokens of each sequence of which ``tokens`` tokens are taken."""
    return max(PIECE, tokens // PIECES)


@dataclass(frozen=True)
class SingleEffects:
    """An evaluator for candidates that differ in one unit: in float32, and on pieces of many texts."""

    inner: Evaluator
    in_pieces: bool = True
    """Whether tokens are spread over many sequences, so that no one text decides; else sequences are whole."""

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Draw exactly ``tokens`` tokens, from the beginnings of about `PIECES` sequences."""
        piece = piece_length(tokens) if self.in_pieces else longest
        return replace(self.inner.draw(tokens, rng, piece), precise=True)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """Evaluate each of ``candidates`` [C, units] on the same minibatch."""
        return self.inner.evaluate(candidates, minibatch)


def measured_starts(
    space: Space, tokens: int, evaluator: Evaluator, rng: np.random.Generator
) -> tuple[list[Candidate], list[TraceRow]]:
    """Candidates of least predicted harm, and the evaluations (generation 0, step 0) that the prediction rests on.

    Each unit with a choice is evaluated alone (`each_at_its_level`). One candidate is of least summed effect on the
    fitness; another, where errors of final hidden states are known, of least summed error.

    Returns:
        The candidates, the one by fitness first.
    """
    candidates, changes = each_at_its_level(space)
    effects_of = SingleEffects(evaluator)
    minibatch = effects_of.draw(tokens, rng)
    evaluations = evaluate(candidates, minibatch, effects_of, {})
    rows = [
        TraceRow(0, 0, number, minibatch, found.fitness, found.by_sequence, False, tuple(candidate.tolist()))
        for number, (candidate, found) in enumerate(zip(candidates, evaluations, strict=True))
    ]
    by_fitness = [found.fitness - evaluations[0].fitness for found in evaluations[1:]]
    by_error = [found.hidden_error for found in evaluations[1:]]
    if any(unit.layer in OUTER for unit in space.units):  # the head comes after the hidden states
        by_error = []
    known = [effects for effects in (by_fitness, by_error) if len(effects) and np.isfinite(effects).all()]
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


def each_at_every_level(space: Space) -> NDArray[np.int16]:
    """Each unit at each of its levels alone, all others dense: [levels of all units, units], by unit."""
    counts = [len(unit.levels) for unit in space.units]
    dense = np.full(len(counts), DENSE_LEVEL, dtype=np.int16)
    levels = np.concatenate([np.arange(count) for count in counts])
    return each_alone(dense, np.repeat(np.arange(len(counts)), counts), levels)


def by_unit_and_level(space: Space, measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the candidates of `each_at_every_level` were ``measured`` at, [units, most levels]; else inf."""
    effects = np.full(space.costs.shape, np.inf)
    effects[np.arange(space.costs.shape[1]) <= space.top[:, None]] = measured
    return effects


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
