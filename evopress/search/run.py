"""The search stage: from variants to a configuration, its trace and its effort, in one process or several."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from evopress import __version__
from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import CONFIGURATION, EFFORT, PROGRESS, TRACE, read_table, write_table
from evopress.config.context import StageContext
from evopress.search.base import Strategy
from evopress.search.configuration import Configuration
from evopress.search.evaluation import Effort, SearchResult, effort_table, read_effort
from evopress.search.problem import SearchContext, SearchProblem, file_facts, of_rank, open_variants
from evopress.search.processes import Ranks, run_in_processes
from evopress.search.resume import ResumeFolder
from evopress.search.sensitivity import read_effects
from evopress.search.target import SizeTarget
from evopress.util.progress import log


def run_search(context: StageContext, name: str, strategy: Strategy) -> None:
    """Choose a level for every unit; write ``run.configuration(name)``, its trace, progress and effort.

    A search that was killed goes on from its last finished round. On SIGTERM the process exits with code 143.
    Strategies that evaluate candidates by the model use all processes, the others one.

    Raises:
        ConfigError: the target, the levels, the text and the memory do not allow the search.
        ArtifactError: variants or tokens are missing, damaged or of another model.
        SearchError: no candidate has a fitness, or one of several processes died.
    """
    if strategy.workers(context.compute.processes) > 1:
        run_in_processes(search, (context, name, strategy), context.compute)
    else:
        search(Ranks(), context, name, strategy)


def search(ranks: Ranks, context: StageContext, name: str, strategy: Strategy) -> None:
    """Search as one of several processes, all of which call this; only the first writes."""
    run = context.run
    problem = open_problem(run, strategy, f"searches.{name}")
    resume = ResumeFolder(run.resume(name), _digest(run, strategy, problem.digests), ranks)
    here = of_rank(context, ranks)
    own = SearchContext(run, here.compute, here.trust_remote_code, name=name, resume=resume, ranks=ranks)
    started = time.monotonic()
    result = strategy.search(own, problem)
    if ranks.rank > 0:
        return
    if not result.effort.seconds:
        result = replace(result, effort=Effort(result.effort.tokens, time.monotonic() - started))
    _write(run, name, strategy, problem, result)
    resume.remove()
    log.info("search %s: %s, %s", name, problem.describe(result.candidate), strategy.sentence())


def open_problem(run: Run, strategy: Strategy, where: str) -> SearchProblem:
    """Open what a search picks from, and what it starts from: single effects, and what other searches have found.

    Raises:
        ConfigError: the target and the levels do not allow the search.
        ArtifactError: variants, effects or configurations are missing, damaged or of another model.
    """
    target = strategy.target
    file = partial(file_facts, run, target) if isinstance(target, SizeTarget) else None
    problem = open_variants(run, strategy.sources, strategy.constraints(where, file))
    found = {name: Configuration.read(run, name).nearest(problem.space) for name in strategy.depends_on()}
    if (asked := strategy.effects()) is not None:
        effects, digest = read_effects(run, asked.name, problem.space, asked.each), sha256(run.effects(asked.name))
        problem = replace(problem, effects=effects, digests=(*problem.digests, digest))
    return replace(problem, earlier=found)


def _write(run: Run, name: str, strategy: Strategy, problem: SearchProblem, result: SearchResult) -> None:
    """Write the artifacts; the configuration, which the others go with, last."""
    # What it took to have what this one starts from is part of what it took.
    started_from = [run.effort(other) for other in strategy.depends_on()]
    if (effects := strategy.effects()) is not None:
        started_from.append(run.effects_effort(effects.name))
    spent = [read_effort(read_table(path, EFFORT)) for path in started_from]
    provenance = Provenance("search", strategy.model_dump_json(), read_model_fingerprint(run))
    write_table(pd.DataFrame(result.records, columns=TRACE.names), run.trace(name), TRACE, provenance)
    write_table(pd.DataFrame(result.progress, columns=PROGRESS.names), run.progress(name), PROGRESS, provenance)
    write_table(effort_table(sum(spent, result.effort)), run.effort(name), EFFORT, provenance)
    chosen = Configuration.of_candidate(problem, result.candidate)
    write_table(chosen.table, run.configuration(name), CONFIGURATION, provenance)


def _digest(run: Run, strategy: Strategy, read: Sequence[str]) -> str:
    """Identify everything that the result of a search depends on: ``read`` are digests of its variants and effects."""
    earlier = [sha256(run.configuration(name)) for name in strategy.depends_on()]
    read = [read_model_fingerprint(run), sha256(run.tokens("search")), *read, *earlier]
    content = [__version__, strategy.model_dump_json(), *read]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
