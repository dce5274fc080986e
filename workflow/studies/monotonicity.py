"""A study of monotonicity, from artifacts to its tables."""

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.artifacts.atomic import write_text
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import write_table
from evopress.config.context import StageContext
from evopress.search.base import Fitness
from evopress.search.engine.evaluator import ModelEvaluator, open_evaluator, search_text
from evopress.search.evaluation import Minibatch
from evopress.search.offered import Constraints
from evopress.search.problem import open_variants
from evopress.util.errors import ConfigError
from evopress.util.progress import stop_on_sigterm
from evopress.util.text import columns
from studies.pairs import ERRORS, KEPT, Judge, find_pairs, rank_correlation, sample, unit_errors
from studies.paths import candidates_path, pairs_path, text_path
from studies.settings import MonotonicitySettings, require_text
from studies.tables import MONOTONICITY_CANDIDATES, MONOTONICITY_PAIRS, Rows

CLAIMS = {ERRORS: "less summed error", KEPT: "strictly more kept"}


def measure_monotonicity(context: StageContext, name: str, settings: MonotonicitySettings) -> None:
    """Write the tables of candidates and of pairs, and text beside the latter.

    Raises:
        ConfigError: the target, the levels and the text do not allow the study.
        ArtifactError: variants or tokens are missing, damaged or of another model.
    """
    run = context.run
    problem = open_variants(run, [settings.variants], Constraints(_where(name), settings.target))
    text, rng = search_text(run), np.random.Generator(np.random.PCG64(settings.seed))
    try:
        look, confirm = _minibatches(settings, text.shape[0], text.shape[1], rng)
    except ValueError as error:
        raise ConfigError(f"{_where(name)}.{error}") from None
    with stop_on_sigterm() as check:
        evaluator = open_evaluator(context, problem, text, Fitness(settings.fitness), _where(name), check)
        judges = _judge(evaluator, look), _judge(evaluator, confirm)
        errors = unit_errors(problem.space, judges[0])
        drawn = sample(problem.space, errors, settings.candidates, settings.raises, settings.switches, rng)
        candidates, pairs = find_pairs(problem.space, drawn, errors, *judges, settings.pairs, settings.least_t)
    provenance = Provenance("monotonicity", settings.model_dump_json(), read_model_fingerprint(run))
    write_table(candidates, candidates_path(run, name), MONOTONICITY_CANDIDATES, provenance)
    write_table(pairs, pairs_path(run, name), MONOTONICITY_PAIRS, provenance)
    table = columns(monotonicity_rows(pairs, settings.fitness))
    findings = monotonicity_findings(candidates, pairs)
    write_text(text_path(pairs_path(run, name)), f"Monotonicity: {name}\n\n{table}\n\n{findings}\n")


def _where(name: str) -> str:
    return f"studies.monotonicity.{name}"


def _minibatches(
    settings: MonotonicitySettings, sequences: int, length: int, rng: np.random.Generator
) -> tuple[Minibatch, Minibatch]:
    """Whole sequences to look for pairs on, and others to confirm them on."""
    look, confirm = require_text(settings, sequences, length)
    order = rng.permutation(sequences)
    parts = (sorted(order[:look].tolist()), sorted(order[look : look + confirm].tolist()))
    first, second = (Minibatch(tuple(part), (length,) * len(part)) for part in parts)
    return first, second


def _judge(evaluator: ModelEvaluator, minibatch: Minibatch) -> Judge:
    def judge(candidates: NDArray[np.int16]) -> NDArray[np.float64]:
        return np.array([found.by_sequence for found in evaluator.evaluate(candidates, minibatch)])

    return judge


def monotonicity_rows(pairs: pd.DataFrame, fitness: str) -> Rows:
    """One row for each pair that was judged again, the clearest first.

    Args:
        pairs: columns of MONOTONICITY_PAIRS.
        fitness: of the study.
    """
    header = ["should be better by", "candidates", "errors", f"{measured(fitness)}", "worse by", "t", "confirmed"]
    return [
        header,
        *(
            [
                CLAIMS[pair["claim"]],
                f"{pair['favoured']}, {pair['other']}",
                f"{pair['favoured_error']:.4g}, {pair['other_error']:.4g}",
                f"{value(pair['favoured_fitness'], fitness):.4g}, {value(pair['other_fitness'], fitness):.4g}",
                f"{pair['difference']:.4f} ±{pair['stderr']:.4f}",
                f"{pair['t']:.1f}",
                "yes" if pair["confirmed"] else "no",
            ]
            for pair in pairs.to_dict("records")
        ),
    ]


def monotonicity_findings(candidates: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """One sentence: how well summed errors rank candidates, and how many pairs speak against each claim."""
    free = int((candidates["base"] < 0).sum())
    counts = []
    for claim, words in CLAIMS.items():
        judged = pairs[pairs["claim"] == claim]
        counts.append(f"{int(judged['confirmed'].sum())} of {len(judged)} pairs of {words} confirmed as worse")
    correlation = (
        f"Rank correlation of summed error and fitness over {free} candidates: {rank_correlation(candidates):.2f}"
    )
    return f"{correlation}. {'; '.join(counts)}."


def measured(fitness: str) -> str:
    """What the values of a fitness function are shown as."""
    return "perplexity" if fitness == "perplexity" else "KL"


def value(mean: float, fitness: str) -> float:
    """A mean fitness as it is shown; that of perplexity is its logarithm."""
    return math.exp(mean) if fitness == "perplexity" else mean
