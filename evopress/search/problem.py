"""What a search picks from: its variants on disk, as a space."""

from dataclasses import dataclass

import pandas as pd

from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import Run, manifest_path
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import CONFIGURATION, MODULES, read_provenance, read_table
from evopress.compression.families import family_of
from evopress.compression.store import VariantStore
from evopress.search.depth import make_depth_space, module_rows, units_from_modules
from evopress.search.space import Candidate, GroupRule, Space, make_space, units_from_variants
from evopress.util.errors import ConfigError


@dataclass(frozen=True)
class Choices:
    """The space of one search, and where its levels come from."""

    space: Space
    variants: str
    """Name of the variants."""
    digests: list[str]
    """Of everything that was read."""
    store: VariantStore | None
    """The weights of the levels; None where levels are to keep or to drop."""
    modules: pd.DataFrame | None = None
    """What may be dropped (MODULES schema)."""

    def configuration(self, candidate: Candidate) -> pd.DataFrame:
        """Table with the CONFIGURATION schema."""
        if self.modules is not None:
            return module_rows(self.modules, self.space, candidate, self.variants)
        return layer_rows(self.space, candidate, self.variants)

    def describe(self, candidate: Candidate) -> str:
        """What a candidate comes to, in words."""
        return self.space.family.describe(self.space.units, candidate.tolist())


def open_choices(run: Run, variants: str, target: float, group_rule: GroupRule, where: str) -> Choices:
    """Open the variants of a search.

    Args:
        run: the run.
        variants: their name.
        target: of the search.
        group_rule: who may trade levels.
        where: dotted path of the search's settings, for messages.

    Raises:
        ConfigError: the target and the levels do not allow the search.
        ArtifactError: variants are missing, damaged or of another model.
    """
    path = run.module_table(variants)
    if path.exists():
        require_same_model(run, read_provenance(path), path)
        modules = read_table(path, MODULES)
        space = make_depth_space(units_from_modules(modules, group_rule), target, where)
        return Choices(space, variants, [sha256(path)], None, modules)
    store = VariantStore(run, variants)
    if store.table.empty:
        raise ConfigError(f"{where}.variants: holds no layer; exclude fewer")
    family = family_of(store.table)
    space = make_space(units_from_variants(store.table, group_rule), target, where, family.name)
    blocks = sorted({unit.block for unit in space.units})
    digests = [sha256(manifest_path(run.variant_tensors(variants, block))) for block in blocks]
    return Choices(space, variants, digests, store)


def layer_rows(space: Space, candidate: Candidate, variants: str) -> pd.DataFrame:
    """The level of each layer, with the CONFIGURATION schema."""
    rows = [
        (
            unit.name,
            unit.block,
            unit.layer,
            variants,
            space.family.name,
            level.label,
            level.value,
            level.cost,
            unit.parameters,
            level.bytes,
        )
        for unit, level in ((unit, unit.levels[index]) for unit, index in zip(space.units, candidate, strict=True))
    ]
    return pd.DataFrame(rows, columns=CONFIGURATION.names)
