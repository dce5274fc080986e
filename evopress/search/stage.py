"""The search stage in one process: from variants to a configuration and its trace."""

import hashlib
import json

import pandas as pd

from evopress import __version__
from evopress.artifacts.consistency import require_same_model
from evopress.artifacts.measure import average, measure_of
from evopress.artifacts.paths import Results
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.tables import CONFIGURATION, TRACE, read_provenance, write_table
from evopress.artifacts.tensors import read_manifest, sha256
from evopress.artifacts.variants import VariantStore
from evopress.config.compute import ComputeSettings
from evopress.config.search import EvolutionSettings, OwlSettings, SearchSettings
from evopress.data.tokens import read_tokens
from evopress.device import resolve_device
from evopress.models.blockwise import BlockwiseModel
from evopress.progress import log
from evopress.search.cooperation import Leader, follow
from evopress.search.fitness import ModelEvaluator
from evopress.search.memory import packed_limit, plan_memory
from evopress.search.packed import PackedWeights
from evopress.search.ranks import Ranks
from evopress.search.resume import ResumeFolder
from evopress.search.space import Candidate, Space, make_space, units_from_variants
from evopress.search.strategies.evolution import check_tokens, evolve, model_evaluator
from evopress.search.strategies.owl import owl
from evopress.search.strategies.uniform import uniform_candidate
from evopress.search.termination import stop_on_sigterm
from evopress.search.trace import trace_table


def search(
    results: Results,
    name: str,
    settings: SearchSettings,
    compute: ComputeSettings,
    trust_remote_code: bool,
    ranks: Ranks | None = None,
) -> None:
    """Choose a level for every unit; write ``results.configuration(name)`` and ``results.trace(name)``.

    With several processes all call this; only the first writes. On SIGTERM the process exits with code 143.

    Raises:
        ConfigError: the target, the levels and the text do not allow the search.
        ArtifactError: variants or tokens are missing, damaged or of another model.
        SearchError: no candidate has a fitness, or another process is gone.
    """
    where, ranks = f"searches.{name}", ranks or Ranks()
    store = VariantStore(results, settings.variants, check=ranks.rank == 0)
    rule = settings.group_rule if isinstance(settings, EvolutionSettings) else "none"
    measure = measure_of(store.table["value"])
    space = make_space(units_from_variants(store.table, rule), settings.target, where, measure)
    resume = ResumeFolder(results.resume(name), _digest(results, settings, space))
    if isinstance(settings, EvolutionSettings):
        found = _evolve(results, name, settings, compute, store, space, resume, trust_remote_code, ranks)
        if found is None:
            return
        chosen, records = found
    elif isinstance(settings, OwlSettings):
        chosen, records = owl(results, space, settings, resolve_device(compute.device), where), []
    else:
        chosen, records = uniform_candidate(space, settings.target, f"{where}.target"), []
    provenance = Provenance("search", settings.model_dump_json(), read_model_fingerprint(results))
    write_table(trace_table(records), results.trace(name), TRACE, provenance)
    configuration = configuration_table(space, chosen, settings.variants)
    write_table(configuration, results.configuration(name), CONFIGURATION, provenance)
    resume.remove()
    reached = average(measure, space.cost_of(chosen), sum(unit.parameters for unit in space.units))
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


def _evolve(
    results: Results,
    name: str,
    settings: EvolutionSettings,
    compute: ComputeSettings,
    store: VariantStore,
    space: Space,
    resume: ResumeFolder,
    trust_remote_code: bool,
    ranks: Ranks,
) -> tuple[Candidate, list[dict]] | None:
    """The winner and the trace; None in a process that only helps the first."""
    where = f"searches.{name}"
    path = results.tokens("search")
    require_same_model(results, read_provenance(path), path)
    tokens = read_tokens(results, "search")
    check_tokens(settings, space, tokens.numel(), where)
    with stop_on_sigterm() as check:

        def make_evaluator() -> ModelEvaluator:
            device = resolve_device(compute.device)
            model = BlockwiseModel.from_folder(
                results.model, device, resident=False, trust_remote_code=trust_remote_code
            )
            limit = packed_limit(compute.memory_gb, plan_memory(compute.memory_gb, model, tokens.shape[1]), model)
            packed = PackedWeights(store, device, model.dtype, limit)
            return model_evaluator(
                model,
                space,
                packed.unpack,
                tokens,
                settings,
                compute,
                where,
                check,
                read_ahead=packed.read_ahead,
                held=packed.bytes if device.type == "cpu" else 0,
                ranks=ranks,
            )

        if ranks.rank > 0:
            follow(ranks, make_evaluator)
            return None
        if ranks.count == 1:
            return evolve(space, settings, make_evaluator, resume, name, check)
        leader = Leader(ranks, make_evaluator)
        found = evolve(space, settings, leader.prepare, resume, name, check)
        leader.stop()
        return found


def _digest(results: Results, settings: SearchSettings, space: Space) -> str:
    """Identify everything that the result of a search depends on."""
    blocks = sorted({unit.block for unit in space.units})
    variants = [read_manifest(results.variant_tensors(settings.variants, block))["sha256"] for block in blocks]
    read = [read_model_fingerprint(results), sha256(results.tokens("search")), *variants]
    content = [__version__, settings.model_dump_json(), *read]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
