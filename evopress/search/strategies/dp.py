"""Dynamic programming: the levels of the least sum of errors, each layer's taken alone (the baseline of the paper).

What is summed are relative errors, with the same weight for every layer: either those of the layers' own outputs,
which the variants' table has from the Hessians, or those of the model's final hidden states when one layer alone is
at a level and all others are dense (`errors: propagated`). Other weights would be other errors: the sum has no term
for how errors of several layers act together, which is what the paper shows to go wrong.
"""

import time

import numpy as np
from numpy.typing import NDArray

from evopress.search.context import Context, Found
from evopress.search.engine.objectives import Fitness
from evopress.search.enumeration import enumeration, fitness_of_each
from evopress.search.record.effort import Effort
from evopress.search.rounds import search_by_model
from evopress.search.settings import DpSettings
from evopress.search.space import DENSE_LEVEL, Space
from evopress.search.strategies.knapsack import least_error
from evopress.util.errors import ArtifactError

PART = 64
"""Candidates that are judged between two moments at which a search may be killed without loss."""


def dynamic_programming(context: Context[DpSettings]) -> Found | None:
    """Choose levels by the sum of their errors.

    Raises:
        ConfigError: the text or the memory is too little.
        ArtifactError: there are no errors, or tokens or variants are missing, damaged or of another model.
        SearchError: an error is no number.
    """
    settings, space = context.settings, context.space
    if settings.errors == "table":
        started = time.monotonic()
        candidate = least_error(space, table_errors(space), settings.resolution)
        return Found(candidate, effort=Effort(seconds=time.monotonic() - started))
    rounds = enumeration(one_alone(space), PART, settings.tokens, settings.seed)
    found = search_by_model(context, rounds, Fitness("hidden_error"), settings.tokens_asked())
    if found is None:
        return None
    errors = alone_errors(space, fitness_of_each(found.records))
    return Found(least_error(space, errors, settings.resolution), found.records, found.effort)


def table_errors(space: Space) -> NDArray[np.float64]:
    """Error of each level as its variant was made, [units, most levels].

    Raises:
        ArtifactError: a level has none.
    """
    errors = np.full(space.costs.shape, np.inf)
    for number, unit in enumerate(space.units):
        errors[number, : len(unit.levels)] = [level.error for level in unit.levels]
    if np.isnan(errors).any():
        unit = space.units[int(np.isnan(errors).any(axis=1).argmax())]
        raise ArtifactError(
            f"the variants of {unit.name} have no layer errors; remake them, or choose `errors: propagated`"
        )
    return errors


def one_alone(space: Space) -> NDArray[np.int16]:
    """Each unit at each of its levels, all others dense: [levels of all units, units], by unit."""
    counts = [len(unit.levels) for unit in space.units]
    candidates = np.full((sum(counts), len(space.units)), DENSE_LEVEL, dtype=np.int16)
    units = np.repeat(np.arange(len(counts)), counts)
    candidates[np.arange(len(units)), units] = np.concatenate([np.arange(count) for count in counts])
    return candidates


def alone_errors(space: Space, measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors [units, most levels] from those of the candidates of `one_alone`."""
    errors = np.full(space.costs.shape, np.inf)
    errors[np.arange(space.costs.shape[1]) <= space.top[:, None]] = measured
    return errors
