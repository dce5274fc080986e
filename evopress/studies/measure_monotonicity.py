"""A study of monotonicity, from artifacts to its tables."""

import numpy as np
from numpy.typing import NDArray

from evopress.artifacts.atomic import write_text
from evopress.artifacts.paths import Run, text_path
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.study_tables import MONOTONICITY_CANDIDATES, MONOTONICITY_PAIRS
from evopress.artifacts.tables import write_table
from evopress.config.compute import ComputeSettings
from evopress.config.context import StageContext
from evopress.config.studies import MonotonicitySettings, require_text
from evopress.plan.text import columns
from evopress.search.base import Fitness
from evopress.search.engine.evaluator import ModelEvaluator, open_evaluator, search_text
from evopress.search.evaluation import Minibatch
from evopress.search.problem import open_variants
from evopress.studies.monotonicity import Judge, find_pairs, sample, unit_errors
from evopress.studies.words import monotonicity_findings, monotonicity_rows
from evopress.util.errors import ConfigError
from evopress.util.termination import stop_on_sigterm


def measure_monotonicity(
    run: Run,
    name: str,
    settings: MonotonicitySettings,
    compute: ComputeSettings,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write ``run.monotonicity_candidates(name)``, ``.monotonicity_pairs(name)``, and text beside the latter.

    Raises:
        ConfigError: the target, the levels and the text do not allow the study.
        ArtifactError: variants or tokens are missing, damaged or of another model.
    """
    context = StageContext(run, compute, trust_remote_code)
    problem = open_variants(run, settings.variants, settings.target, "none", _where(name))
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
    write_table(candidates, run.monotonicity_candidates(name), MONOTONICITY_CANDIDATES, provenance)
    write_table(pairs, run.monotonicity_pairs(name), MONOTONICITY_PAIRS, provenance)
    table = columns(monotonicity_rows(pairs, settings.fitness))
    findings = monotonicity_findings(candidates, pairs)
    write_text(text_path(run.monotonicity_pairs(name)), f"Monotonicity: {name}\n\n{table}\n\n{findings}\n")


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
