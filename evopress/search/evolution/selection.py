"""Multi-step selection: few tokens for many candidates, many tokens for the few that are left.

arXiv 2410.14649, algorithm 1: each step draws fresh tokens; parents are admitted to the last step only, so they are
compared where the judgement is surest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evopress.search.minibatch import Minibatch
from evopress.search.record.trace import PARENT, TraceRow


@dataclass(frozen=True)
class Judgement:
    """Fitness of one candidate on one minibatch; lower is better."""

    fitness: float
    """Mean over tokens."""
    by_sequence: tuple[float, ...]
    """Mean over the tokens of each sequence."""
    hidden_error: float = math.nan
    """Squared error of the final hidden states relative to the dense model's, mean over tokens; NaN if not known."""


class Evaluator(Protocol):
    """Judges candidates; the search knows nothing else of models, tokens or bits."""

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Draw exactly ``tokens`` tokens, from sequences cut to ``longest`` (`draw_minibatch`)."""
        ...

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Judgement]:
        """Judge each of ``candidates`` [C, units] on the same minibatch."""
        ...


@dataclass(frozen=True)
class Step:
    """One selection step."""

    survivors: int
    tokens: int


Known = dict[tuple[bytes, Minibatch], Judgement]
"""Judgements made so far, by candidate and tokens."""


@dataclass(frozen=True)
class Selection:
    """The winners, and each judgement that led to them."""

    winners: NDArray[np.int16]
    """[survivors of the last step, units], best first."""
    judgement: Judgement
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
        evaluator: judges.
        known: judgements that need not be made again; those made here are added.
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
        judged = judge(candidates, minibatch, evaluator, known)
        # Stable, with NaN last: of equals the first stays, and parents come first.
        order = np.argsort([judgement.fitness for judgement in judged], kind="stable")[: step.survivors]
        rows += [
            TraceRow(
                generation=generation,
                step=number,
                candidate=i,
                minibatch=minibatch,
                fitness=judgement.fitness,
                fitness_by_sequence=judgement.by_sequence,
                accepted=last and k in order,
                levels=tuple(candidates[k].tolist()),
                remembered=remembered[k],
            )
            for k, (i, judgement) in enumerate(zip(left, judged, strict=True))
        ]
        left = sorted(left[k] for k in order)
    return Selection(candidates[order], judged[order[0]], rows)


def judge(candidates: NDArray[np.int16], minibatch: Minibatch, evaluator: Evaluator, known: Known) -> list[Judgement]:
    """Judge candidates together, except those that were judged on the very same tokens before."""
    keys = [(candidate.tobytes(), minibatch) for candidate in candidates]
    new = [index for index, key in enumerate(keys) if key not in known]
    if new:
        judged = evaluator.evaluate(candidates[new], minibatch)
        known.update({keys[index]: judgement for index, judgement in zip(new, judged, strict=True)})
    return [known[key] for key in keys]
