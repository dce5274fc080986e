"""The engine on objectives whose optimum is known: generations to reach it against k(n - k)/lambda.

Theorem of the paper (arXiv 2410.14649, section 3): on a linear objective over bit strings of length n with k ones, the
(1 + lambda) search with one switch an offspring needs O(k(n - k)/lambda) generations, as long as lambda is small
against n. Here the engine that searches models is given such strings: n units with two levels, of which k are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.artifacts.atomic import write_text
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.tables import write_table
from evopress.compression.base import Level, Unit
from evopress.config.context import StageContext
from evopress.search.candidates import make_offspring
from evopress.search.evaluation import Evaluation, Minibatch
from evopress.search.selection import State, Step, select_next
from evopress.search.space import Space
from evopress.util.progress import progress
from evopress.util.text import columns
from studies.paths import convergence_path, text_path
from studies.settings import ConvergenceSettings
from studies.tables import CONVERGENCE, Rows

NO_MODEL = ""
"""Fingerprint in the provenance of what was made without a model."""
DRAWN = "min(U(1,3), U(1,3))"
"""Name of the paper's mutation, which draws the number of switches of each offspring."""


@dataclass(frozen=True)
class LinearObjective:
    """An evaluator: the sum of the weights of the units that are kept."""

    weights: NDArray[np.float64]

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Another minibatch each time, so that no judgement is remembered."""
        return Minibatch((int(rng.integers(1 << 62)),), (tokens,))

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """Judge each of ``candidates`` [C, units]; the minibatch means nothing."""
        return [Evaluation(float(value), (float(value),)) for value in candidates @ self.weights]


@dataclass(frozen=True)
class Case:
    """One run."""

    units: int
    kept: int
    offspring: int
    switches: int | None
    seed: int

    @property
    def bound(self) -> float:
        """k(n - k)/lambda."""
        return self.kept * (self.units - self.kept) / self.offspring


def measure_convergence(context: StageContext, settings: ConvergenceSettings) -> None:
    """Write the table of all runs, and its fits as text beside it.

    Raises:
        ArtifactError: they cannot be written.
    """
    runs = list(cases(settings.units, settings.kept, settings.offspring, settings.switches, settings.runs))
    with progress("convergence", len(runs), "runs") as bar:
        table = convergence_table(runs, bar.advance)
    path = convergence_path(context.run)
    write_table(table, path, CONVERGENCE, Provenance("convergence", settings.model_dump_json(), NO_MODEL))
    title = "Generations to the optimum of linear objectives, against k(n - k)/lambda"
    write_text(text_path(path), f"{title}\n\n{columns(convergence_rows(table))}\n")


def bit_space(units: int, kept: int) -> Space:
    """``units`` units with levels 0 and 1, of which at most ``kept`` are at 1."""
    levels = (Level("0", 0.0, 0, 0), Level("1", 1.0, 1, 0))
    return Space(tuple(Unit(f"{unit}", unit, "bit", "all", 1, levels) for unit in range(units)), (kept,))


def generations_to_optimum(case: Case) -> int:
    """Generations until the units of least weight are the ones that are kept; weights and start are random."""
    rng = np.random.Generator(np.random.PCG64(case.seed))
    weights = rng.permutation(case.units).astype(np.float64) + 1
    space, objective = bit_space(case.units, case.kept), LinearObjective(weights)
    start = np.zeros((1, case.units), dtype=np.int16)
    start[0, rng.choice(case.units, case.kept, replace=False)] = 1
    optimum = np.sort(weights)[: case.kept].sum()
    state = State(0, start)
    while state.parent @ weights > optimum:
        offspring = make_offspring(state.population, space, case.offspring, rng, case.switches)
        state, _ = select_next(state, offspring, [Step(1, 1)], objective, rng)
    return state.generation


def cases(
    units: Sequence[int],
    shares: Sequence[float],
    offspring: Sequence[int],
    switches: Sequence[int | None],
    seeds: int,
) -> Iterator[Case]:
    """Every combination; ``shares`` of the units are kept, rounded, but at least one unit and not all."""
    for count in switches:
        for number in units:
            for kept in sorted({min(max(1, round(share * number)), number - 1) for share in shares}):
                for children in offspring:
                    yield from (Case(number, kept, children, count, seed) for seed in range(seeds))


def convergence_table(runs: Sequence[Case], advance: Callable[[], None] = lambda: None) -> pd.DataFrame:
    """Run all cases; ``advance`` is called after each.

    Returns:
        Columns of CONVERGENCE.
    """
    rows = []
    for case in runs:
        name = DRAWN if case.switches is None else str(case.switches)
        found = generations_to_optimum(case)
        rows.append((name, case.units, case.kept, case.offspring, case.seed, case.bound, found))
        advance()
    return pd.DataFrame(rows, columns=CONVERGENCE.names)


def fits(table: pd.DataFrame) -> pd.DataFrame:
    """How the mean generations of each (n, k, lambda) grow with the bound, for each kind of mutation.

    Args:
        table: columns of CONVERGENCE, with at least two different bounds of each kind.

    Returns:
        Columns switches; slope and r2 of generations = slope x bound (least squares through the origin, r2 about the
        mean); exponent of generations ~ bound^exponent (least squares of logarithms); cases.
    """
    rows = []
    for switches, runs in table.groupby("switches", sort=False):
        means = runs.groupby(["units", "kept", "offspring"])[["bound", "generations"]].mean()
        x, y = means["bound"].to_numpy(), means["generations"].to_numpy()
        slope = float(x @ y / (x @ x))
        r2 = 1 - float(((y - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum())
        # A start may be the optimum by chance; half a generation stands for none.
        exponent = float(np.polyfit(np.log(x), np.log(np.maximum(y, 0.5)), 1)[0])
        rows.append((switches, slope, r2, exponent, len(means)))
    return pd.DataFrame(rows, columns=["switches", "slope", "r2", "exponent", "cases"])


def convergence_rows(table: pd.DataFrame) -> Rows:
    """One row of text for each kind of mutation.

    Args:
        table: columns of CONVERGENCE.
    """
    header = ["switches", "cases", "slope", "R²", "exponent"]
    return [
        header,
        *(
            [fit["switches"], f"{fit['cases']}", f"{fit['slope']:.2f}", f"{fit['r2']:.3f}", f"{fit['exponent']:.2f}"]
            for fit in fits(table).to_dict("records")
        ),
    ]
