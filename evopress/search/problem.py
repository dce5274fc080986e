"""The problem that a search solves, and what it is given to solve it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from evopress.artifacts.manifest import load_manifest, sha256
from evopress.artifacts.paths import EMBEDDING, Run, manifest_path
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import LAYERS, MODULES, read_provenance, read_table
from evopress.compression.base import Family, Level, Unit
from evopress.compression.families import MIXED, family_of
from evopress.compression.joint import JointStore, joint_units, module_units
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.models.checkpoint import Checkpoint
from evopress.search.offered import Constraints, only_levels, tied_units
from evopress.search.processes import Ranks
from evopress.search.resume import ResumeFolder
from evopress.search.sensitivity import Effects
from evopress.search.space import Candidate, Space, make_space
from evopress.search.target import FileFacts, SizeTarget
from evopress.util.errors import ConfigError


@dataclass(frozen=True)
class SearchProblem:
    """A level is wanted for every unit, within a budget."""

    space: Space
    family: Family
    variants: str
    """Name of the variants that the levels are of; empty where each level has its own."""
    where: str
    """Dotted path of the search's settings, for messages."""
    store: VariantStore | JointStore | None = None
    """The weights of the levels; None where levels are to keep or to drop, and before variants are made."""
    modules: pd.DataFrame | None = None
    """What may be dropped (MODULES schema), where levels are to keep or to drop."""
    families: Mapping[str, Family] = field(default_factory=dict)
    """Families of several variants, by their name; empty where the levels are of one."""
    earlier: Mapping[str, Candidate] = field(default_factory=dict)
    """What the searches that this one depends on have found, as candidates of this space, whatever they cost."""
    effects: Effects | None = None
    """Single effects, where the search starts from them."""
    digests: tuple[str, ...] = ()
    """Of all variants and single effects that were read."""

    def describe(self, candidate: Candidate) -> str:
        """What a candidate comes to, in words."""
        words, work = self.family.describe(self.space.units, candidate.tolist()), self.space.work
        if work is None:
            return words
        return f"{words}, {self.space.work_of(candidate) / work.dense:.4g} of the multiply-adds"


@dataclass(frozen=True, kw_only=True)
class RankContext(StageContext):
    """A stage in one of its processes."""

    ranks: Ranks = field(default_factory=Ranks)


@dataclass(frozen=True, kw_only=True)
class SearchContext(RankContext):
    """One named search of a run, in one of its processes."""

    name: str
    resume: ResumeFolder


def of_rank(context: StageContext, ranks: Ranks) -> RankContext:
    """The stage in one of its processes, which has a device of its own."""
    compute = context.compute
    if ranks.count > 1:
        compute = compute.model_copy(update={"device": str(ranks.device), "processes": 1})
    return RankContext(context.run, compute, context.trust_remote_code, ranks=ranks)


def open_variants(run: Run, names: Sequence[str], asked: Constraints) -> SearchProblem:
    """Open variants, or several together, as a problem.

    Raises:
        ConfigError: the target and the levels do not allow the search.
        ArtifactError: variants are missing, damaged or of another model.
    """
    opened = [_open(run, name) for name in names]
    tables = {one.name: one.table for one in opened}
    stores = {one.name: one.store for one in opened if one.store is not None}
    modules = [one.table for one in opened if one.store is None]
    return replace(
        problem_of(tables, asked),
        store=JointStore(stores) if len(stores) > 1 else next(iter(stores.values()), None),
        modules=modules[0] if modules else None,
        digests=tuple(digest for one in opened for digest in one.digests),
    )


@dataclass(frozen=True)
class _Opened:
    """Variants of a run."""

    name: str
    table: pd.DataFrame
    """VARIANTS schema, or MODULES where levels are to keep or to drop."""
    store: VariantStore | None
    """Their weights; None of modules."""
    digests: tuple[str, ...]
    """Of all that was read."""


def _open(run: Run, name: str) -> _Opened:
    path = run.module_table(name)
    if path.exists():
        require_same_model(run, read_provenance(path), path)
        return _Opened(name, read_table(path, MODULES), None, (sha256(path),))
    store = VariantStore(run, name)
    held = [part for part in store.parts if part == EMBEDDING or part in set(store.table["block"])]
    digests = tuple(sha256(manifest_path(run.variant_tensors(name, part))) for part in held)
    return _Opened(name, store.table, store, digests)


def problem_of(tables: Mapping[str, pd.DataFrame], asked: Constraints) -> SearchProblem:
    """The problem that the tables of variants make, by their name; without weights.

    Args:
        tables: VARIANTS or MODULES schema, or as of `Method.table`; one, or several together.
        asked: of their levels.

    Raises:
        ConfigError: the target and the levels do not allow the search.
    """
    if empty := [name for name, table in tables.items() if table.empty]:
        what = f"{empty[0]!r} " if len(tables) > 1 else ""
        raise ConfigError(f"{asked.where}.variants: {what}holds nothing to choose from; exclude fewer")
    if len(tables) == 1:
        ((name, table),) = tables.items()
        return _of_one(table, name, asked)
    families = {name: family_of(table) for name, table in tables.items()}
    layers = joint_units({name: tables[name] for name in tables if not families[name].takes_modules}, asked.group_rule)
    if isinstance(asked.target, SizeTarget):
        layers = _as_in_file(layers, asked.target)
    modules = [
        unit
        for name, family in families.items()
        if family.takes_modules
        for unit in module_units(name, tables[name], layers, asked.where)
    ]
    tied = tied_units(layers, asked.tied, asked.group_rule, asked.where)
    units = sorted([*modules, *tied], key=lambda unit: unit.block)
    if asked.target is None:
        space = _without_budget(units, in_bytes=True)
    else:
        assert asked.file is not None
        facts = asked.file(layers)
        # What a module holds without levels is counted with it, and not with what is always there.
        facts = replace(facts, fixed=facts.fixed - sum(unit.levels[-1].bytes for unit in modules))
        space = make_space(MIXED, units, asked.target, asked.where, facts)
    return SearchProblem(space, MIXED, "", asked.where, families=families)


def _of_one(table: pd.DataFrame, name: str, asked: Constraints) -> SearchProblem:
    """The problem that the table of one variants makes."""
    family = family_of(table)
    offered = table if family.takes_modules else only_levels(table, asked.levels, asked.where)
    units = family.units(offered, asked.group_rule)
    facts = None
    if isinstance(asked.target, SizeTarget):
        assert asked.file is not None
        units = _as_in_file(units, asked.target)
        facts = asked.file(units)
    if not family.takes_modules:
        units = tied_units(units, asked.tied, asked.group_rule, asked.where)
    if asked.target is None:
        space = _without_budget(units)
    else:
        space = make_space(family, units, asked.target, asked.where, facts)
    return SearchProblem(space, family, name, asked.where)


def _without_budget(units: Sequence[Unit], *, in_bytes: bool = False) -> Space:
    """A space of units of one group in which each may have its most expensive level."""
    space = Space(tuple(units), (), in_bytes)
    return replace(space, group_budgets=(int(space.costs.max(axis=1).sum()),))


def _as_in_file(units: Sequence[Unit], target: SizeTarget) -> tuple[Unit, ...]:
    """Units whose levels have the bytes that the file of the target takes for them."""
    if target.file is None:
        return tuple(units)
    return tuple(replace(unit, levels=_as_stored(unit, target.file)) for unit in units)


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
    elements = checkpoint.elements()
    facts = FileFacts(fixed, sum(sizes.values()), sum(elements.values()), source=origin.get("gguf_bytes"))
    return (
        facts
        if target.multiply_adds is None
        else replace(facts, multiply_adds=_multiply_adds(run, checkpoint, elements))
    )


def _multiply_adds(run: Run, checkpoint: Checkpoint, elements: Mapping[str, int]) -> int:
    """Of the dense model's linear layers and head for a token; a tied head is the largest tensor outside the blocks."""
    layers = read_table(run.layers, LAYERS)
    inside = {checkpoint.stored_name(f"{name}.weight") for name in layers["name"]}
    own = checkpoint.stored_name("lm_head.weight")
    head = elements[own] if own else max(count for name, count in elements.items() if name not in inside)
    return int(layers["parameters"].sum()) + head
