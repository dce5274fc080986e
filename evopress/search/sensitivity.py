"""Measuring what each unit's compression alone costs the model, and starts from that.

Effects of single units are small: where the model works in 16 bits, rounding its hidden states costs more than the
compression of most layers. They are measured in float32 (`SingleEffects`).

The starts are beyond the paper, and off by default. To first order the divergence of a compressed model is a sum of
what each unit's compression costs alone (the linearity theorem of HIGGS, arXiv 2411.17525). Seen from a model that is
already compressed, such a cost drowns in the noise of all the other errors; seen from the dense model, few tokens show
it clearly. It is seen more clearly still in the final hidden states, whose error has less noise than a divergence but
says less of what matters, so each gives a start. Layer errors only give the shape of a unit's levels around the one
that is measured: as costs they choose badly. What the sums miss is left to the evolution, which goes on from the best
of these and the uniform start.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import EFFECTS, read_provenance, read_table
from evopress.models.modules import OUTER
from evopress.search.budget import relaxed_least_error
from evopress.search.evaluation import Evaluation, Evaluator, Minibatch
from evopress.search.selection import each_alone
from evopress.search.space import DENSE_LEVEL, Candidate, Space
from evopress.util.errors import ArtifactError

PIECES = 16
"""Sequences over which the tokens are spread on which units are evaluated alone ..."""
PIECE = 32
"""... if each then gives at least so many; few tokens come from fewer."""
DROPS = (1.0, 2.0, 4.0, 8.0, 1e6)
"""Weights of what dropped modules do alone, from which there is a start each; with the last, few or none go."""
LEAST = 1e-12
"""An effect that is measured as less than this is taken for noise."""


@dataclass(frozen=True)
class Effects:
    """What units do alone, all others dense; one entry for each unit that has a choice."""

    levels: dict[int, int]
    """Level at which each unit was measured, by its number."""
    fitness: tuple[float, ...]
    """By how much the fitness was worse than the dense model's."""
    hidden_errors: tuple[float, ...]
    """Error of final hidden states relative to the dense model's; NaN where it is not known."""


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


def single_effects(space: Space, tokens: int, evaluator: Evaluator, rng: np.random.Generator) -> Effects:
    """Evaluate each unit with a choice alone (`each_at_its_level`), all on the same ``tokens`` tokens."""
    candidates, levels = each_at_its_level(space)
    effects_of = SingleEffects(evaluator)
    dense, *alone = effects_of.evaluate(candidates, effects_of.draw(tokens, rng))
    fitness = tuple(found.fitness - dense.fitness for found in alone)
    return Effects(levels, fitness, tuple(found.hidden_error for found in alone))


def most_promising(
    parent: Candidate,
    pool: NDArray[np.int16],
    count: int,
    space: Space,
    tokens: int,
    evaluator: Evaluator,
    rng: np.random.Generator,
) -> NDArray[np.int16]:
    """Those of ``pool`` [n, units] of which single steps from ``parent`` promise most.

    Every unit is evaluated alone a level above and a level below the parent's, all others as the parent has them, on
    the same ``tokens`` tokens; a candidate promises the sum of what its steps do. Far from the dense model this is
    another sum than the one that single effects give, which are measured from there.

    Returns:
        [at most ``count``, units], the most promising first; those that differ from the parent by more than a level of
        a unit only where there are no others.
    """
    steps = np.array([(unit, way) for unit in range(len(parent)) for way in (-1, 1)])
    wanted = parent[steps[:, 0]] + steps[:, 1]
    steps = steps[(wanted >= 0) & (wanted <= space.top[steps[:, 0]])]
    alone = each_alone(parent, steps[:, 0], parent[steps[:, 0]] + steps[:, 1])
    precise = not all(unit.modules for unit in space.units)  # rounding hides nothing of what a module does
    minibatch = replace(evaluator.draw(tokens, rng, piece_length(tokens)), precise=precise)
    before, *after = evaluator.evaluate(np.vstack([parent[None], alone]), minibatch)
    effects = np.full((3, len(parent)), math.inf)
    effects[1] = 0.0
    for (unit, way), found in zip(steps.tolist(), after, strict=True):
        effects[way + 1, unit] = found.fitness - before.fitness
    moved = pool.astype(np.int64) - parent
    known = np.abs(moved) <= 1
    sums = np.where(known, effects[np.clip(moved, -1, 1) + 1, np.arange(len(parent))], math.inf).sum(axis=1)
    return pool[np.argsort(sums, kind="stable")[:count]]


def read_effects(run: Run, name: str, space: Space) -> Effects:
    """What was measured, for the units of ``space``; ``name`` is that of the single effects.

    Raises:
        ArtifactError: missing, damaged, or of another model or other units.
    """
    path = run.effects(name)
    table = read_table(path, EFFECTS)
    require_same_model(run, read_provenance(path), path)
    known = {
        unit.name: (number, [level.label for level in unit.levels])
        for number, unit in enumerate(space.units)
        if len(unit.levels) > 1
    }
    if list(table["unit"]) != list(known):
        raise ArtifactError(f"{path}: is of other layers than the variants; delete it, run again")
    levels = {}
    for unit, label in zip(table["unit"], table["level"], strict=True):
        number, labels = known[unit]
        levels[number] = labels.index(label)
    return Effects(levels, tuple(table["fitness"]), tuple(table["hidden_error"]))


def measured_starts(space: Space, effects: Effects) -> list[Candidate]:
    """Candidates of least predicted harm.

    One is of least summed effect on the fitness; another, where errors of final hidden states are known, of least
    summed error. The one by fitness is first.
    """
    by_error = effects.hidden_errors
    if any(unit.layer in OUTER for unit in space.units):  # the head comes after the hidden states
        by_error = ()
    known = [found for found in (effects.fitness, by_error) if len(found) and np.isfinite(found).all()]
    return [start for found in known or [effects.fitness] for start in _least_effects(space, effects.levels, found)]


def each_at_its_level(space: Space) -> tuple[NDArray[np.int16], dict[int, int]]:
    """The dense model, and each unit with a choice alone at its `reference_level`, all others dense.

    Returns:
        Candidates [1 + n, units], and the level of each of the n units.
    """
    levels = {unit: reference_level(space, unit) for unit in np.flatnonzero(space.top > 0).tolist()}
    dense = np.full(len(space.units), DENSE_LEVEL, dtype=np.int16)
    return np.vstack([dense, each_alone(dense, list(levels), list(levels.values()))]), levels


def reference_level(space: Space, unit: int) -> int:
    """The middle one of the levels of a unit that are worth their cost (of two, the cheaper), whatever the budget.

    From the middle, the others are least far. A level is worth its cost if no cheaper one has as small an error: a
    model that comes as Q4_1, say, is all but whole at that type, and worse at the larger Q5_0.
    """
    least, worth = math.inf, list[int]()
    for level, height in enumerate(_shape(space, unit).tolist()):
        if height < least:
            worth.append(level)
            least = height
    return worth[(len(worth) - 1) // 2]


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


def _least_effects(space: Space, changes: Mapping[int, int], effects: Sequence[float]) -> list[Candidate]:
    """Candidates of least summed effect, from what each unit's level in ``changes`` was measured to do alone.

    Where modules hold layers there are several: what dropped modules do together is more than the sum of what each
    does alone, so that sum is taken `DROPS` times as seriously.
    """
    if not len(space.modules):
        return [_least_effect(space, changes, effects)]
    drops = np.isin(list(changes), space.modules)
    weighed = [np.where(drops, weight * np.asarray(effects), effects).tolist() for weight in DROPS]
    return [_least_effect(space, changes, each) for each in weighed]


def _least_effect(space: Space, changes: Mapping[int, int], effects: Sequence[float]) -> Candidate:
    """Candidate of least summed effect, from what each unit's level in ``changes`` was measured to do alone."""
    known = np.zeros(space.costs.shape)
    for (unit, level), effect in zip(changes.items(), effects, strict=True):
        shape = _shape(space, unit)
        known[unit, : len(shape)] = max(effect, LEAST) * (shape / shape[level] if shape[level] > 0 else shape)
    return relaxed_least_error(space, known)


def _shape(space: Space, unit: int) -> NDArray[np.float64]:
    """Effect of each level as a share of the worst level's, from layer errors; without them, from costs."""
    levels = space.units[unit].levels
    heights = np.array([level.error for level in levels])
    known = bool(np.isfinite(heights).all())
    if known and levels[0].source:  # of several variants: one with more bytes may well be worse
        return heights / heights.max() if heights.max() > 0 else heights
    if not known or heights[0] <= heights[-1]:
        if levels[0].source:  # what a module takes is what its layers do
            costs = space.costs[unit, : len(levels)].astype(np.float64)
        else:
            costs = np.array([level.cost for level in levels], dtype=np.float64)
        heights = costs[-1] - costs
    return (heights / heights[0]).clip(0.0) if heights[0] > 0 else np.zeros(len(levels))
