"""How a search got on: the best so far, judged on one fixed part of the search text.

Every generation judges on tokens of its own, so fitness in a trace jumps with the text. Once the rounds are over, each
candidate that was the best for a while is judged on the same tokens, beside the uniform choice. What a search finds
does not depend on it. Which part it is depends on its size alone. It is not held out: the rounds draw from all
the text.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evopress.search.candidates import uniform_of_size, uniform_starts
from evopress.search.evaluation import Evaluator, Incumbent, Minibatch
from evopress.search.problem import SearchProblem
from evopress.search.space import Candidate
from evopress.util.progress import log

SHARE = 0.05
"""Tokens that are judged to show the progress, as a share of those that the search judged (but one sequence each)."""
MOST = 32
"""Candidates that are judged, at most."""


def judge_progress(
    problem: SearchProblem, incumbents: Sequence[Incumbent], evaluator: Evaluator, sequences: int, length: int
) -> list[dict[str, Any]]:
    """Judge the best so far on a fixed part of the text; all processes of the search call this together.

    Args:
        problem: that was solved.
        incumbents: the best after each generation, the first one the start.
        evaluator: of the search.
        sequences: of the search text.
        length: tokens of each.

    Returns:
        Records of the PROGRESS schema: uniform choices, where there are any; each change of the best; and the last
        generation.
    """
    changes = _changes(incumbents)
    judged = _thinned(changes)
    uniform = _uniform(problem)
    candidates = [each.candidate for each in judged] + uniform
    spent = incumbents[-1].effort.tokens
    part = fixed_part(int(SHARE * spent / len(candidates)), sequences, length)
    found = [evaluation.fitness for evaluation in evaluator.evaluate(np.array(candidates), part)]
    share = len(candidates) * part.tokens / max(1, spent)
    text = "%d candidates judged on %d tokens each to show the progress: %.1f %% of what the search judged"
    log.info(text, len(candidates), part.tokens, 100 * share)
    fitness = {each.generation: value for each, value in zip(judged, found[: len(judged)], strict=True)}
    before = [changes[0], *changes]
    rows = [
        _record(
            "best", each, fitness.get(each.generation, np.nan), part, _moved(problem, old.candidate, each.candidate)
        )
        for old, each in zip(before, changes, strict=False)
    ]
    if incumbents[-1].generation > changes[-1].generation:
        rows.append(_record("best", incumbents[-1], found[len(judged) - 1], part))
    return [*(_record("uniform", incumbents[0], value, part) for value in found[len(judged) :]), *rows]


def fixed_part(tokens: int, sequences: int, length: int) -> Minibatch:
    """About ``tokens`` tokens as whole sequences, at least one, from all over the text."""
    count = min(sequences, max(1, tokens // length))
    rows = (np.arange(count) * sequences // count).tolist()
    return Minibatch(tuple(rows), (length,) * count)


def _changes(incumbents: Sequence[Incumbent]) -> list[Incumbent]:
    """The start, and each that differs from the one before it."""
    changed = (new for old, new in pairwise(incumbents) if (new.candidate != old.candidate).any())
    return [incumbents[0], *changed]


def _thinned(changes: Sequence[Incumbent]) -> list[Incumbent]:
    """At most `MOST` of them, evenly, with the first and the last."""
    numbers = np.linspace(0, len(changes) - 1, min(MOST, len(changes))).round().astype(int)
    return [changes[number] for number in numbers.tolist()]


def _uniform(problem: SearchProblem) -> list[Candidate]:
    """The same level everywhere, as far as the budget goes, of each of several variants; none of modules alone."""
    found = uniform_starts(problem.space)
    if found or problem.space.is_joint or problem.family.takes_modules:
        return found
    return [uniform_of_size(problem.space)]


def _moved(problem: SearchProblem, old: Candidate, new: Candidate) -> tuple[list[str], list[str]]:
    """Names of the units that went up, and of those that went down."""

    def named(which: NDArray[np.bool_]) -> list[str]:
        """Names of the units that a mask [units] marks."""
        return [problem.space.units[unit].name for unit in np.flatnonzero(which)]

    return named(new > old), named(new < old)


def _record(
    candidate: str,
    incumbent: Incumbent,
    fitness: float,
    part: Minibatch,
    moved: tuple[list[str], list[str]] = ([], []),
) -> dict[str, Any]:
    return {
        "candidate": candidate,
        "generation": incumbent.generation,
        "tokens": incumbent.effort.tokens,
        "seconds": incumbent.effort.seconds,
        "fitness": fitness,
        "part": part.tokens,
        "raised": moved[0],
        "lowered": moved[1],
    }
