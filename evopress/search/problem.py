"""The problem that a search solves, and what it is given to solve it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd

from evopress.artifacts.manifest import load_manifest, sha256
from evopress.artifacts.paths import EMBEDDING, Run, manifest_path
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import MODULES, read_provenance, read_table
from evopress.compression.base import Family, GroupRule, Level, Unit
from evopress.compression.families import family_of
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.models.checkpoint import Checkpoint
from evopress.search.base import Strategy
from evopress.search.offered import Ties, only_levels, tied_units
from evopress.search.processes.ranks import Ranks
from evopress.search.resume import ResumeFolder
from evopress.search.space import Candidate, Space, make_space
from evopress.search.target import FileFacts, SizeTarget
from evopress.util.errors import ConfigError


@dataclass(frozen=True)
class SearchProblem:
    """A level is wanted for every unit, within a budget."""

    space: Space
    family: Family
    variants: str
    """Name of the variants that the levels are of."""
    where: str
    """Dotted path of the search's settings, for messages."""
    store: VariantStore | None = None
    """The weights of the levels; None where levels are to keep or to drop, and before variants are made."""
    modules: pd.DataFrame | None = None
    """What may be dropped (MODULES schema), where levels are to keep or to drop."""
    earlier: Mapping[str, Candidate] = field(default_factory=dict)
    """What the searches that this one depends on have found, as candidates of this space, whatever they cost."""
    digests: tuple[str, ...] = ()
    """Of all variants that were read."""

    def describe(self, candidate: Candidate) -> str:
        """What a candidate comes to, in words."""
        return self.family.describe(self.space.units, candidate.tolist())


@dataclass(frozen=True, kw_only=True)
class SearchContext(StageContext):
    """One named search of a run, in one of its processes."""

    name: str
    resume: ResumeFolder
    ranks: Ranks = field(default_factory=Ranks)


def open_problem(run: Run, strategy: Strategy, where: str) -> SearchProblem:
    """Open what a search picks from, and what the searches that it depends on have found.

    Raises:
        ConfigError: the target and the levels do not allow the search.
        ArtifactError: variants or configurations are missing, damaged or of another model.
    """
    from evopress.search.configuration import Configuration  # which knows problems

    target = strategy.target
    file = partial(file_facts, run, target) if isinstance(target, SizeTarget) else None
    problem = open_variants(
        run, strategy.variants, target, strategy.grouping(), where, strategy.tied, strategy.levels, file
    )
    found = {name: Configuration.read(run, name).nearest(problem.space) for name in strategy.depends_on()}
    return replace(problem, earlier=found)


def open_variants(
    run: Run,
    variants: str,
    target: float | SizeTarget,
    group_rule: GroupRule,
    where: str,
    tied: Ties = (),
    levels: Sequence[str] | None = None,
    file: Callable[[Sequence[Unit]], FileFacts] | None = None,
) -> SearchProblem:
    """Open variants as a problem.

    Args:
        run: the run.
        variants: their name.
        target: of the search.
        group_rule: who may trade levels.
        where: dotted path of the search's settings, for messages.
        tied: layers that share a level.
        levels: labels of those that are offered; None is all.
        file: gives what is known of the file of which the target is the size.

    Raises:
        ConfigError: the target and the levels do not allow the search.
        ArtifactError: variants are missing, damaged or of another model.
    """
    path = run.module_table(variants)
    if path.exists():
        require_same_model(run, read_provenance(path), path)
        table, store, modules = read_table(path, MODULES), None, read_table(path, MODULES)
        digests = [sha256(path)]
    else:
        store, modules = VariantStore(run, variants), None
        table = store.table
        held = [part for part in store.parts if part == EMBEDDING or part in set(table["block"])]
        digests = [sha256(manifest_path(run.variant_tensors(variants, part))) for part in held]
    problem = problem_of(table, variants, target, group_rule, where, tied, levels, file)
    return replace(problem, store=store, modules=modules, digests=tuple(digests))


def problem_of(
    table: pd.DataFrame,
    variants: str,
    target: float | SizeTarget,
    group_rule: GroupRule,
    where: str,
    tied: Ties = (),
    levels: Sequence[str] | None = None,
    file: Callable[[Sequence[Unit]], FileFacts] | None = None,
) -> SearchProblem:
    """The problem that a table of variants (VARIANTS or MODULES schema, or `Method.table`) makes; without weights.

    Raises:
        ConfigError: the target and the levels do not allow the search.
    """
    if table.empty:
        raise ConfigError(f"{where}.variants: holds nothing to choose from; exclude fewer")
    family = family_of(table)
    units = family.units(table if family.takes_modules else only_levels(table, levels, where), group_rule)
    facts = None
    if isinstance(target, SizeTarget):
        assert file is not None
        if target.file is not None:
            units = tuple(replace(unit, levels=_as_stored(unit, target.file)) for unit in units)
        facts = file(units)
    if not family.takes_modules:
        units = tied_units(units, tied, group_rule, where)
    return SearchProblem(make_space(family, units, target, where, facts), family, variants, where)


def _as_stored(unit: Unit, exporter: Any) -> tuple[Level, ...]:
    """Levels with the bytes that a file of the exporter takes for them."""
    return tuple(replace(level, bytes=exporter.stored_bytes(level.bytes)) for level in unit.levels)


def file_facts(run: Run, target: SizeTarget, units: Sequence[Unit]) -> FileFacts:
    """What is known of the file whose size is the target, once the model is there.

    Raises:
        ArtifactError: the model is missing or damaged.
        UnsupportedArchitectureError: the exporter cannot write such a model.
    """
    checkpoint = Checkpoint(run.model)
    sizes, searched = checkpoint.sizes(), [f"{unit.name}.weight" for unit in units]
    if target.file is None:
        stored = {checkpoint.stored_name(name) for name in searched}
        fixed = sum(size for name, size in sizes.items() if name not in stored)
    else:
        fixed = target.file.fixed_bytes(run, searched)
    origin = load_manifest(run.model_manifest, "model").get("origin", {})
    return FileFacts(fixed, sum(sizes.values()), sum(checkpoint.elements().values()), origin.get("gguf_bytes"))
