"""The search stage in one process: from variants to a configuration, its trace and its effort."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from evopress import __version__
from evopress.artifacts.measure import Measure, average, measure_of
from evopress.artifacts.paths import Results
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import CONFIGURATION, EFFORT, TRACE, write_table
from evopress.artifacts.tensors import read_manifest, sha256
from evopress.artifacts.variants import VariantStore
from evopress.config.compute import ComputeSettings
from evopress.config.search import EvolutionSettings, OwlSettings, SearchSettings, UniformSettings
from evopress.device import resolve_device
from evopress.progress import log
from evopress.search.context import Context, Found, Strategy
from evopress.search.effort import Effort, effort_table
from evopress.search.ranks import Ranks
from evopress.search.resume import ResumeFolder
from evopress.search.space import Candidate, Space, make_space, units_from_variants
from evopress.search.strategies.evolution import evolution
from evopress.search.strategies.owl import owl
from evopress.search.strategies.uniform import uniform_candidate
from evopress.search.trace import trace_table


def search(
    results: Results,
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
    space, measure, store, read = _open(results, settings, f"searches.{name}", check=ranks.rank == 0)
    resume = ResumeFolder(results.resume(name), _digest(results, settings, read))
    context = Context(results, name, settings, compute, space, store, resume, ranks, trust_remote_code)
    found = _STRATEGIES[type(settings)](context)
    if found is None:
        return
    provenance = Provenance("search", settings.model_dump_json(), read_model_fingerprint(results))
    write_table(trace_table(found.records), results.trace(name), TRACE, provenance)
    write_table(effort_table(found.effort), results.effort(name), EFFORT, provenance)
    configuration = configuration_table(space, found.candidate, settings.variants)
    write_table(configuration, results.configuration(name), CONFIGURATION, provenance)
    resume.remove()
    reached = average(measure, space.cost_of(found.candidate), sum(unit.parameters for unit in space.units))
    log.info("search %s: %d units, %s %.4f on average", name, len(space.units), measure, reached)


def configuration_table(space: Space, candidate: Candidate, variants: str) -> pd.DataFrame:
    """Table with the CONFIGURATION schema."""
    rows = [
        (
            unit.name,
            unit.block,
            unit.layer,
            variants,
            level.label,
            level.value,
            level.cost,
            unit.parameters,
            level.bytes,
        )
        for unit, level in ((unit, unit.levels[index]) for unit, index in zip(space.units, candidate, strict=True))
    ]
    return pd.DataFrame(rows, columns=CONFIGURATION.names)


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
    return owl(context.results, context.space, context.settings, device, context.where)


_STRATEGIES: dict[type, Strategy] = {
    UniformSettings: _timed(_uniform),
    EvolutionSettings: evolution,
    OwlSettings: _timed(_owl),
}


def _open(
    results: Results, settings: SearchSettings, where: str, *, check: bool
) -> tuple[Space, Measure, VariantStore, list[str]]:
    """The space, what its levels count, their weights, and digests of what was read for them."""
    store = VariantStore(results, settings.variants, check=check)
    rule = settings.group_rule if isinstance(settings, EvolutionSettings) else "none"
    measure = measure_of(store.table)
    space = make_space(units_from_variants(store.table, rule), settings.target, where, measure)
    blocks = sorted({unit.block for unit in space.units})
    read = [read_manifest(results.variant_tensors(settings.variants, block))["sha256"] for block in blocks]
    return space, measure, store, read


def _digest(results: Results, settings: SearchSettings, read: Sequence[str]) -> str:
    """Identify everything that the result of a search depends on; ``read`` are digests of its variants."""
    read = [read_model_fingerprint(results), sha256(results.tokens("search")), *read]
    content = [__version__, settings.model_dump_json(), *read]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
