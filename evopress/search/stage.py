"""The search stage in one process: from variants to a configuration, its trace and its effort."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from evopress import __version__
from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import CONFIGURATION, EFFORT, TRACE, read_table, write_table
from evopress.config.compute import ComputeSettings
from evopress.search.context import Context, Found, Strategy
from evopress.search.problem import Choices, open_choices
from evopress.search.processes.ranks import Ranks
from evopress.search.record.effort import Effort, effort_table, read_effort
from evopress.search.record.resume import ResumeFolder
from evopress.search.record.trace import trace_table
from evopress.search.settings import (
    BruteSettings,
    DpSettings,
    EvolutionSettings,
    GreedySettings,
    ImportedSettings,
    OwlSettings,
    RandomSettings,
    ScoresSettings,
    SearchSettings,
    UniformSettings,
)
from evopress.search.space import Candidate, GroupRule
from evopress.search.strategies.brute import brute
from evopress.search.strategies.dp import dynamic_programming
from evopress.search.strategies.evolution import evolution
from evopress.search.strategies.greedy import greedy
from evopress.search.strategies.imported import imported
from evopress.search.strategies.owl import owl
from evopress.search.strategies.random import random_search
from evopress.search.strategies.scores import scores
from evopress.search.strategies.uniform import uniform_candidate
from evopress.util.device import resolve_device
from evopress.util.progress import log


def search(
    results: Run,
    name: str,
    settings: SearchSettings,
    compute: ComputeSettings,
    trust_remote_code: bool,
    ranks: Ranks | None = None,
) -> None:
    """Choose a level for every unit; write ``results.configuration(name)``, ``.trace(name)`` and ``.effort(name)``.

    With several processes all call this; only the first writes. On SIGTERM the process exits with code 143.

    Raises:
        ConfigError: the target, the levels and the text do not allow the search.
        ArtifactError: variants or tokens are missing, damaged or of another model.
        SearchError: no candidate has a fitness, or another process is gone.
    """
    ranks = ranks or Ranks()
    choices = _open(results, settings, f"searches.{name}")
    resume = ResumeFolder(results.resume(name), _digest(results, settings, choices.digests))
    context = Context(results, name, settings, compute, choices.space, choices.store, resume, ranks, trust_remote_code)
    found = _STRATEGIES[type(settings)](context)
    if found is None:
        return
    provenance = Provenance("search", settings.model_dump_json(), read_model_fingerprint(results))
    write_table(trace_table(found.records), results.trace(name), TRACE, provenance)
    write_table(effort_table(_whole_effort(found.effort, results, settings)), results.effort(name), EFFORT, provenance)
    write_table(choices.configuration(found.candidate), results.configuration(name), CONFIGURATION, provenance)
    resume.remove()
    log.info("search %s: %s", name, choices.describe(found.candidate))


def _timed(choose: Callable[[Context[Any]], Candidate]) -> Strategy:
    """A strategy of one step, which judges no candidate."""

    def run(context: Context[Any]) -> Found:
        started = time.monotonic()
        candidate = choose(context)
        return Found(candidate, effort=Effort(seconds=time.monotonic() - started))

    return run


def _uniform(context: Context[UniformSettings]) -> Candidate:
    return uniform_candidate(context.space, context.settings.target, f"{context.where}.target")


def _owl(context: Context[OwlSettings]) -> Candidate:
    device = resolve_device(context.compute.device)
    return owl(context.run, context.space, context.settings, device, context.where)


_STRATEGIES: dict[type, Strategy] = {
    UniformSettings: _timed(_uniform),
    EvolutionSettings: evolution,
    RandomSettings: random_search,
    GreedySettings: greedy,
    DpSettings: dynamic_programming,
    OwlSettings: _timed(_owl),
    ScoresSettings: scores,
    BruteSettings: brute,
    ImportedSettings: _timed(imported),
}


def _open(results: Run, settings: SearchSettings, where: str) -> Choices:
    rule: GroupRule = "none"
    if isinstance(settings, EvolutionSettings | RandomSettings | GreedySettings | DpSettings):
        rule = settings.group_rule
    return open_choices(results, settings.variants, settings.target, rule, where)


def _whole_effort(own: Effort, results: Run, settings: SearchSettings) -> Effort:
    """What a search has taken, with what was spent on those that it rests on."""
    return sum((read_effort(read_table(results.effort(name), EFFORT)) for name in settings.rests_on()), own)


def _digest(results: Run, settings: SearchSettings, read: Sequence[str]) -> str:
    """Identify everything that the result of a search depends on: ``read`` are digests of its variants."""
    earlier = [sha256(results.configuration(name)) for name in settings.rests_on()]
    read = [read_model_fingerprint(results), sha256(results.tokens("search")), *read, *earlier]
    content = [__version__, settings.model_dump_json(), *read]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
