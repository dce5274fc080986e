"""Measuring what each unit's compression alone costs the model, and starts from that.

Effects of single units are small: where the model works in 16 bits, rounding its hidden states costs more than the
compression of most layers. They are measured in float32 (`SingleEffects`).

The starts are beyond the paper, and off by default. To first order the divergence of a compressed model is a sum of
what each unit's compression costs alone (the linearity theorem of HIGGS, arXiv 2411.17525). Seen from a model that is
already compressed, such a cost drowns in the noise of all the other errors; seen from the dense model, few tokens show
it clearly. The error of final hidden states has less noise than a divergence but says less of what matters, so there
is a start by the divergence, and one by the geometric mean of both. Layer errors only give the shape of a unit's levels
around those that are measured: as costs they choose badly. A budget far below the middle level is served better by
starts from two levels, one near it by those from the middle one alone, so there are both. What the sums miss is left to
the evolution, which goes on from the best of these and the uniform start.
"""

import math
from collections.abc import Sequence
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
"""An effect that is measured as less than this is taken for noise, ..."""
BROKEN = 1e3
"""... and this for that of a level with which the model gives no finite fitness."""


@dataclass(frozen=True)
class Effects:
    """What units do alone, all others dense: one entry for each unit that has a choice, then those at lower levels."""

    alone: tuple[tuple[int, int], ...]
    """Number and level of the unit that was measured."""
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


def single_effects(
    space: Space, tokens: int, evaluator: Evaluator, rng: np.random.Generator, levels: int = 1
) -> Effects:
    """Evaluate each unit with a choice alone (`each_at_its_levels`), all on the same ``tokens`` tokens."""
    candidates, alone = each_at_its_levels(space, levels)
    effects_of = SingleEffects(evaluator)
    dense, *compressed = effects_of.evaluate(candidates, effects_of.draw(tokens, rng))
    fitness = tuple(found.fitness - dense.fitness for found in compressed)
    return Effects(alone, fitness, tuple(found.hidden_error for found in compressed))


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


def read_effects(run: Run, name: str, space: Space, levels: int = 1) -> Effects:
    """What was measured, for the units of ``space``; ``name`` is that of the single effects at so many ``levels``.

    Raises:
        ArtifactError: missing, damaged, or of another model or other units.
    """
    path = run.effects(name)
    table = read_table(path, EFFECTS)
    require_same_model(run, read_provenance(path), path)
    _, alone = each_at_its_levels(space, levels)
    if list(zip(table["unit"], table["level"], strict=True)) != [names_of(space, *one) for one in alone]:
        raise ArtifactError(f"{path}: is of other layers or levels than the variants; delete it, run again")
    return Effects(alone, tuple(table["fitness"]), tuple(table["hidden_error"]))


def names_of(space: Space, unit: int, level: int) -> tuple[str, str]:
    """Of a unit and its level."""
    return space.units[unit].name, space.units[unit].levels[level].label


def measured_starts(space: Space, effects: Effects) -> list[Candidate]:
    """Candidates of least predicted harm, the one by fitness at the units' middle levels first.

    By fitness, and, where errors of final hidden states are known, by the geometric mean of both; each from the middle
    levels, and where units were measured at two, from both.
    """
    fitness = np.nan_to_num(effects.fitness, nan=BROKEN, posinf=BROKEN).clip(LEAST)
    errors = np.asarray(effects.hidden_errors, dtype=np.float64)
    known = [fitness]
    if len(errors) and np.isfinite(errors).all() and not any(unit.layer in OUTER for unit in space.units):
        known.append(np.sqrt(fitness * np.maximum(errors, LEAST)))  # the head comes after the hidden states
    middle = int(np.count_nonzero(space.top > 0))
    return [
        start
        for count in sorted({middle, len(effects.alone)})
        for found in known
        for start in _least_effects(space, effects.alone[:count], found[:count])
    ]


def each_at_its_levels(space: Space, levels: int = 1) -> tuple[NDArray[np.int16], tuple[tuple[int, int], ...]]:
    """The dense model, and each unit with a choice alone at its `reference_levels`, all others dense.

    Returns:
        Candidates [1 + n, units]; number and level of the unit that each but the first compresses: all at their middle
        levels, then, if two ``levels`` are asked for, those that have a lowest one beside it.
    """
    references = {unit: reference_levels(space, unit) for unit in np.flatnonzero(space.top > 0).tolist()}
    alone = [(unit, middle) for unit, (middle, *_) in references.items()]
    if levels > 1:
        alone += [(unit, lowest) for unit, (_, *lower) in references.items() for lowest in lower]
    dense = np.full(len(space.units), DENSE_LEVEL, dtype=np.int16)
    units, at = np.array(alone, dtype=np.int64).reshape(-1, 2).T
    return np.vstack([dense, each_alone(dense, units, at)]), tuple(alone)


def reference_levels(space: Space, unit: int) -> tuple[int, ...]:
    """The middle one of the levels of a unit that are worth their cost (of two, the cheaper), and the lowest of more.

    From the middle, the others are least far, whatever the budget. A level is worth its cost if no cheaper one has as
    small an error: a model that comes as Q4_1, say, is all but whole at that type, and worse at the larger Q5_0.
    """
    least, worth = math.inf, list[int]()
    for level, height in enumerate(_shape(space, unit).tolist()):
        if height < least:
            worth.append(level)
            least = height
    middle = worth[(len(worth) - 1) // 2]
    return (middle,) if middle == worth[0] else (middle, worth[0])


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


def _least_effects(space: Space, alone: Sequence[tuple[int, int]], effects: NDArray[np.float64]) -> list[Candidate]:
    """Candidates of least summed effect, from what units at a level were measured to do ``alone``.

    Where modules hold layers there are several: what dropped modules do together is more than the sum of what each
    does alone, so that sum is taken `DROPS` times as seriously.
    """
    if not len(space.modules):
        return [relaxed_least_error(space, effects_of_levels(space, alone, effects))]
    drops = np.isin([unit for unit, _ in alone], space.modules)
    weighed = [np.where(drops, weight * effects, effects) for weight in DROPS]
    return [relaxed_least_error(space, effects_of_levels(space, alone, each)) for each in weighed]


def effects_of_levels(
    space: Space, alone: Sequence[tuple[int, int]], effects: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Effects of all levels of all units, [units, most levels], from those of units at a level ``alone`` (positive).

    Beyond the levels that were measured, an effect is proportional to the layer's error; between two, a power of it.
    """
    measured: dict[int, dict[int, float]] = {}
    for (unit, level), effect in zip(alone, effects.tolist(), strict=True):
        measured.setdefault(unit, {})[level] = effect
    known = np.zeros(space.costs.shape)
    for unit, found in measured.items():
        shape = _shape(space, unit)
        at = sorted((level for level in found if shape[level] > 0), key=lambda level: float(shape[level]))
        if not at:
            known[unit, : len(shape)] = max(found.values()) * shape
            continue
        rising = np.maximum.accumulate([found[level] for level in at])  # what says otherwise is noise
        with np.errstate(divide="ignore"):
            heights = np.log(shape)
        within = heights.clip(heights[at[0]], heights[at[-1]])
        known[unit, : len(shape)] = np.exp(np.interp(within, heights[at], np.log(rising)) + heights - within)
    return known


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
