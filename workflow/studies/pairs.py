"""Pairs of candidates of which the one that should be better is worse, found by sampling and confirmed on other text.

Two claims that would make the search superfluous are put to the test (arXiv 2410.14649, section 1 and table 1): that
less summed error of the single units, or strictly more kept, makes the better model. Pairs that speak against them are
looked for among random candidates on some text. The most telling of them are judged again on text that had no part in
the choice, sequence by sequence, so that a lucky draw does not pass for a finding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.search.budget import least_error
from evopress.search.candidates import initial_candidates, mutate, uniform_start
from evopress.search.space import Candidate, Space
from studies.tables import MONOTONICITY_CANDIDATES, MONOTONICITY_PAIRS

Judge = Callable[[NDArray[np.int16]], NDArray[np.float64]]
"""Candidates [C, units] to the mean fitness of each on each sequence of a text, [C, S]; lower is better."""
ERRORS, KEPT = "errors", "kept"
"""Names of the two claims."""
RESOLUTION = 100_000
"""Steps into which the budget of the candidate of least summed error is cut at most."""


@dataclass(frozen=True)
class Sample:
    """Candidates to compare: free ones that meet the budget, and some that keep strictly more than one of those."""

    candidates: NDArray[np.int16]
    """[C, units]."""
    bases: NDArray[np.int64]
    """[C]: the candidate that each keeps more than; -1 of a free one."""


@dataclass(frozen=True)
class Paired:
    """Mean difference of two candidates over the sequences of a text."""

    difference: float
    stderr: float

    @property
    def t(self) -> float:
        """Difference in standard errors; 0 where there is none."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.stderr if self.stderr > 0 else float(np.copysign(np.inf, self.difference))


def paired(favoured: NDArray[np.float64], other: NDArray[np.float64]) -> Paired:
    """Compare two candidates on the same sequences, [S] each; what the sequences share cancels out."""
    differences = favoured - other
    return Paired(float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences))))


def sample(
    space: Space, errors: NDArray[np.float64], free: int, raises: int, most_switches: int, rng: np.random.Generator
) -> Sample:
    """Draw candidates by 1 to ``most_switches`` level switches from a uniform start, and raise single units of them.

    To these come the uniform candidate, where it meets the budget, and the one of least summed error: what the first
    claim would have one choose.

    Args:
        space: units, levels and budget.
        errors: of each level of each unit, as `unit_errors` gives them.
        free: random candidates that meet the budget.
        raises: candidates made of each of these by raising one unit by one level.
        most_switches: how far from uniform they go.
        rng: consumed.
    """
    starts = initial_candidates(space, free, rng)
    drawn = [mutate(starts[i % len(starts)], space, int(rng.integers(1, most_switches + 1)), rng) for i in range(free)]
    marked = [least_error(space, errors, RESOLUTION), *filter(space.fits, [uniform_start(space)])]
    distinct = list({candidate.tobytes(): candidate for candidate in [*marked, *drawn]}.values())
    more = [(base, child) for base, parent in enumerate(distinct) for child in _raised(parent, space, raises, rng)]
    return Sample(
        np.array([*distinct, *(child for _, child in more)], dtype=np.int16),
        np.array([-1] * len(distinct) + [base for base, _ in more]),
    )


def _raised(candidate: Candidate, space: Space, count: int, rng: np.random.Generator) -> Iterator[Candidate]:
    options = np.flatnonzero(candidate < space.top)
    for unit in rng.choice(options, min(count, len(options)), replace=False):
        child = candidate.copy()
        child[unit] += 1
        yield child


def unit_errors(space: Space, judge: Judge) -> NDArray[np.float64]:
    """Error of each level of each unit, [units, most levels]: those of the variants, or else measured.

    A measured error is the rise in fitness by the unit at that level and all others at their dearest.
    """
    known = np.full(space.costs.shape, np.nan)
    for unit, about in enumerate(space.units):
        known[unit, : len(about.levels)] = [level.error for level in about.levels]
    places = [(unit, level) for unit, top in enumerate(space.top.tolist()) for level in range(top)]
    if np.isfinite([known[place] for place in places]).all():
        return np.nan_to_num(known)
    candidates = np.repeat(space.top[None], len(places) + 1, axis=0)
    for row, (unit, level) in enumerate(places, start=1):
        candidates[row, unit] = level
    fitness = judge(candidates).mean(axis=1)
    errors = np.zeros(space.costs.shape)
    errors[tuple(np.transpose(places))] = fitness[1:] - fitness[0]
    return errors


def summed(errors: NDArray[np.float64], candidates: NDArray[np.int16]) -> NDArray[np.float64]:
    """Sum of the errors of the units of each of ``candidates`` [C, units]."""
    return errors[np.arange(len(errors)), candidates].sum(axis=1)


def suspects(
    drawn: Sample, errors: NDArray[np.float64], values: NDArray[np.float64], claim: str, most: int
) -> list[tuple[int, int]]:
    """Pairs (favoured, other) that speak most clearly against a claim; no candidate is in two of them.

    Args:
        drawn: the candidates.
        errors: their summed errors, [C].
        values: their fitness by sequence, [C, S].
        claim: ERRORS or KEPT.
        most: pairs to return.
    """
    pairs = _claimed(drawn, errors) if claim == ERRORS else [(i, int(b)) for i, b in enumerate(drawn.bases) if b >= 0]
    by_clarity = sorted(((paired(values[i], values[j]).t, i, j) for i, j in pairs), key=lambda found: -found[0])
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for t, favoured, other in by_clarity:
        if t <= 0 or len(chosen) == most:
            break
        if not used & {favoured, other}:
            chosen.append((favoured, other))
            used |= {favoured, other}
    return chosen


def _claimed(drawn: Sample, errors: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Free candidates in pairs, the one of less summed error first."""
    free = np.flatnonzero(drawn.bases < 0)
    ordered = free[np.argsort(errors[free], kind="stable")].tolist()
    return [(i, j) for place, i in enumerate(ordered) for j in ordered[place + 1 :] if errors[i] < errors[j]]


def pairs_table(
    chosen: dict[str, list[tuple[int, int]]],
    errors: NDArray[np.float64],
    values: dict[int, NDArray[np.float64]],
    least_t: float,
) -> pd.DataFrame:
    """Suspected pairs of each claim, judged on text that had no part in choosing them.

    Args:
        chosen: pairs by claim.
        errors: summed errors, [C].
        values: fitness by sequence of that text, [S], by candidate.
        least_t: standard errors by which the favoured one must be worse for the pair to be confirmed.

    Returns:
        Columns of MONOTONICITY_PAIRS, the clearest first.
    """
    rows = []
    for claim, pairs in chosen.items():
        for favoured, other in pairs:
            a, b = values[favoured], values[other]
            found = paired(a, b)
            means = (float(a.mean()), float(b.mean()))
            about = (claim, favoured, other, errors[favoured], errors[other], *means)
            rows.append((*about, found.difference, found.stderr, found.t, len(a), found.t >= least_t))
    table = pd.DataFrame(rows, columns=MONOTONICITY_PAIRS.names)
    return table.sort_values(["claim", "t"], ascending=[True, False], kind="stable", ignore_index=True)


def candidates_table(
    space: Space, drawn: Sample, errors: NDArray[np.float64], values: NDArray[np.float64]
) -> pd.DataFrame:
    """All candidates, with the columns of MONOTONICITY_CANDIDATES."""
    rows = [
        (number, int(base), errors[number], space.cost_of(levels), values[number].mean(), levels.tolist())
        for number, (base, levels) in enumerate(zip(drawn.bases, drawn.candidates, strict=True))
    ]
    return pd.DataFrame(rows, columns=MONOTONICITY_CANDIDATES.names)


def find_pairs(
    space: Space,
    drawn: Sample,
    errors: NDArray[np.float64],
    look: Judge,
    confirm: Judge,
    most: int,
    least_t: float,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judge a sample on one text, and the pairs that speak against the claims on another.

    Args:
        space: units and levels.
        drawn: the candidates.
        errors: of each level of each unit, as `unit_errors` gives them.
        look: judges on the text that pairs are looked for on.
        confirm: judges on other text.
        most: pairs of each claim that are judged again.
        least_t: as `pairs_table`.

    Returns:
        Candidates and pairs, as `candidates_table` and `pairs_table` give them.
    """
    sums, values = summed(errors, drawn.candidates), look(drawn.candidates)
    chosen = {claim: suspects(drawn, sums, values, claim, most) for claim in (ERRORS, KEPT)}
    again = sorted({number for pairs in chosen.values() for pair in pairs for number in pair})
    judged = dict(zip(again, confirm(drawn.candidates[again]), strict=True)) if again else {}
    return candidates_table(space, drawn, sums, values), pairs_table(chosen, sums, judged, least_t)


def rank_correlation(candidates: pd.DataFrame) -> float:
    """Spearman's correlation of summed error and fitness among the free candidates."""
    free = candidates[candidates["base"] < 0]
    return float(free["error"].rank().corr(free["fitness"].rank()))
