"""The variants stage of depth pruning: which modules may leave the model, and which of them leave together."""

from fnmatch import fnmatchcase

import pandas as pd

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import LAYERS, MODULES, read_provenance, read_table, write_table
from evopress.compression.settings import DropSettings
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import KINDS, module_name
from evopress.util.errors import ConfigError
from evopress.util.progress import log


def make_module_table(run: Run, name: str, settings: DropSettings) -> None:
    """Write ``run.module_table(name)``; files that another method left under this name are removed.

    Raises:
        ArtifactError: the table of layers is missing, damaged or of another model.
        ConfigError: a pattern of ``exclude`` matches no module, or all modules are excluded.
    """
    require_same_model(run, read_provenance(run.layers), run.layers)
    layers = read_table(run.layers, LAYERS)
    checkpoint = Checkpoint(run.model)
    sizes = checkpoint.sizes()
    stored = layers["name"].map(lambda layer: sizes[checkpoint.stored_name(f"{layer}.weight") or layer])
    table = module_table(layers.assign(bytes=stored), settings, f"variants.{name}")
    path = run.module_table(name)
    for pattern in ("*.safetensors", "*.json", "block_*.parquet"):
        for other in path.parent.glob(pattern):
            other.unlink()
    provenance = Provenance("variants", settings.model_dump_json(), read_model_fingerprint(run))
    write_table(table, path, MODULES, provenance)
    log.info("variants %s: %d modules in %d units may be dropped", name, len(table), table["unit"].nunique())


def module_table(layers: pd.DataFrame, settings: DropSettings, where: str) -> pd.DataFrame:
    """Table with the MODULES schema, by block, attention first.

    A unit of which a module is excluded stays as a whole, and so does a last block without a partner to form a pair.

    Args:
        layers: columns of LAYERS, and ``bytes``.
        settings: units and exclusions.
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: a pattern matches no module, or nothing may be dropped.
    """
    rows = []
    for (block, kind), members in layers.groupby(["block", "module"], sort=False):
        first = members.iloc[0]
        prefix = str(first["name"]).removesuffix(f".{first['layer']}")
        rows.append((block, kind, module_name(prefix, str(kind)), members["parameters"].sum(), members["bytes"].sum()))
    table = pd.DataFrame(rows, columns=["block", "module", "name", "parameters", "bytes"])
    table = table.sort_values(["block", "module"], key=_running_order, kind="stable", ignore_index=True)
    named = zip(table["name"].tolist(), table["block"].tolist(), strict=True)
    table["unit"] = [_unit(name, block, settings.unit) for name, block in named]
    fixed = {row.unit for row in table.itertuples() if _excluded(str(row.name), table, settings, where)}
    whole = table.groupby("unit")["block"].nunique() == (2 if settings.unit == "pair" else 1)
    table = table[~table["unit"].isin(fixed) & table["unit"].map(whole)]
    if table.empty:
        raise ConfigError(f"{where}: no {settings.unit} may be dropped; exclude fewer")
    return table[MODULES.names].reset_index(drop=True)


def _running_order(column: pd.Series) -> pd.Series:
    return column.map(KINDS.index) if column.name == "module" else column


def _unit(name: str, block: int, unit: str) -> str:
    """Name of the unit that a module belongs to."""
    if unit == "module":
        return name
    prefix = name.rpartition(".")[0]
    if unit == "block":
        return prefix
    blocks = prefix.rpartition(".")[0]
    first = block - block % 2
    return f"{blocks}.{first}-{first + 1}"


def _excluded(name: str, table: pd.DataFrame, settings: DropSettings, where: str) -> bool:
    for pattern in settings.exclude:
        if not any(fnmatchcase(other, pattern) for other in table["name"]):
            raise ConfigError(f"{where}.exclude: {pattern!r} matches no module; names look like {name!r}")
    return any(fnmatchcase(name, pattern) for pattern in settings.exclude)
