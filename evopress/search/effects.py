"""Single effects as an artifact: what each unit's compression alone does to the model, measured once for all searches.

Searches that start from single effects (`start: sensitivity`) share one set of them as long as it would be the same: of
the same variants, levels and ties, on as many tokens, in the same fitness. Neither a budget nor a seed is part of that,
so another target, or a whole front of them, measures nothing again.
"""

import time

import numpy as np
import pandas as pd

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import EFFECTS, EFFORT, write_table
from evopress.config.context import StageContext
from evopress.search.base import EffectsSettings
from evopress.search.engine.evaluator import SearchEvaluator, require_tokens, search_text
from evopress.search.evaluation import CountingEvaluator, Effort, effort_table
from evopress.search.problem import of_rank, open_variants
from evopress.search.processes import Ranks, run_in_processes
from evopress.search.sensitivity import Effects, names_of, single_effects
from evopress.search.space import Space
from evopress.util.progress import log, stop_on_sigterm

SEED = 0
"""Of the choice of tokens: the same for all searches, whatever theirs is."""


def measure_effects(context: StageContext, settings: EffectsSettings) -> None:
    """Evaluate each unit alone; write ``run.effects(settings.name)`` and what it took.

    On SIGTERM the process exits with code 143; nothing is kept of what a killed one has measured.

    Raises:
        ConfigError: the text or the memory is too little.
        ArtifactError: variants or tokens are missing, damaged or of another model.
        SearchError: one of several processes died.
    """
    if settings.workers(context.compute.processes) > 1:
        run_in_processes(measure, (context, settings), context.compute)
    else:
        measure(Ranks(), context, settings)


def measure(ranks: Ranks, context: StageContext, settings: EffectsSettings) -> None:
    """Evaluate as one of several processes, all of which call this; only the first writes."""
    run = context.run
    problem = open_variants(run, settings.sources, settings.constraints())
    tokens = search_text(run)
    require_tokens(settings.tokens_asked(), tokens.numel(), settings.where)
    started = time.monotonic()
    with stop_on_sigterm() as check:
        evaluator = SearchEvaluator(of_rank(context, ranks), problem, tokens, settings.minimizes(), check)
        counting = CountingEvaluator(evaluator)
        rng = np.random.Generator(np.random.PCG64(SEED))
        effects = single_effects(problem.space, settings.tokens, counting, rng, settings.each)
    seconds = time.monotonic() - started
    if ranks.rank == 0:
        _write(run, settings, problem.space, effects, Effort(counting.tokens, seconds))
        log.info("effects %s: %s", settings.name, evaluator.counters.summary(seconds))


def _write(run: Run, settings: EffectsSettings, space: Space, effects: Effects, effort: Effort) -> None:
    """Write both tables; the effects, which the other goes with, last."""
    provenance = Provenance("effects", settings.model_dump_json(), read_model_fingerprint(run))
    measured = zip(effects.alone, effects.fitness, effects.hidden_errors, strict=True)
    rows = [(*names_of(space, *one), fitness, error) for one, fitness, error in measured]
    write_table(effort_table(effort), run.effects_effort(settings.name), EFFORT, provenance)
    write_table(pd.DataFrame(rows, columns=EFFECTS.names), run.effects(settings.name), EFFECTS, provenance)
