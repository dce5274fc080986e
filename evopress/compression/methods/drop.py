"""Depth pruning: which modules may leave the model, and which of them leave together."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from evopress.compression.base import Method
from evopress.compression.families import DROP, KEEP, MODULES
from evopress.config.context import StageContext
from evopress.models.modules import KINDS, module_name
from evopress.util.errors import ConfigError
from evopress.util.progress import log

if TYPE_CHECKING:
    import pandas as pd


class Drop(Method):
    """Attention and MLP modules that may leave the model (depth pruning)."""

    family = MODULES
    method: Literal["drop"] = "drop"
    unit: Literal["module", "block", "pair"] = Field(
        "module",
        description="What is dropped as one: an attention or MLP module, a block, or two consecutive blocks (0 and 1, "
        "2 and 3, ...).",
    )
    exclude: tuple[str, ...] = Field(
        (), description="Patterns of module names that always stay, as in `*.layers.0.attn` or `*.mlp`."
    )

    def labels(self) -> list[str]:
        """A module stays or goes."""
        return [DROP, KEEP]

    def target_problems(self, target: float, where: str) -> Iterator[str]:
        """A target that is no whole number of blocks, or of pairs."""
        if not target.is_integer():
            yield f"{where}.target: {target:g} is no number of blocks to drop, which is what these variants offer"
        elif self.unit == "pair" and target % 2:
            yield f"{where}.target: {target:g} blocks are no whole pairs; choose an even number, or `unit: block`"

    def table(self, layers: "pd.DataFrame", itemsize: int, where: str) -> "pd.DataFrame":
        """The modules with the MODULES schema, as `module_table` gives them."""
        return self.module_table(layers.assign(bytes=layers["parameters"] * itemsize), where)

    def module_table(self, layers: "pd.DataFrame", where: str) -> "pd.DataFrame":
        """Table with the MODULES schema, by block, attention first.

        A unit of which a module is excluded stays as a whole, and so does a last block without a partner to form a
        pair.

        Args:
            layers: columns of LAYERS, and ``bytes``.
            where: dotted path of the settings, for messages.

        Raises:
            ConfigError: a pattern matches no module, or nothing may be dropped.
        """
        import pandas as pd

        from evopress.artifacts.tables import MODULES as SCHEMA

        rows = []
        for (block, kind), members in layers.groupby(["block", "module"], sort=False):
            first = members.iloc[0]
            prefix = str(first["name"]).removesuffix(f".{first['layer']}")
            name = module_name(prefix, str(kind))
            rows.append((block, kind, name, members["parameters"].sum(), members["bytes"].sum()))
        table = pd.DataFrame(rows, columns=["block", "module", "name", "parameters", "bytes"])
        table = table.sort_values(["block", "module"], key=_running_order, kind="stable", ignore_index=True)
        named = zip(table["name"].tolist(), table["block"].tolist(), strict=True)
        table["unit"] = [_unit(name, block, self.unit) for name, block in named]
        fixed = {row.unit for row in table.itertuples() if self._excluded(str(row.name), table, where)}
        whole = table.groupby("unit")["block"].nunique() == (2 if self.unit == "pair" else 1)
        table = table[~table["unit"].isin(fixed) & table["unit"].map(whole)].assign(family=self.family.name)
        if table.empty:
            raise ConfigError(f"{where}: no {self.unit} may be dropped; exclude fewer")
        return table[SCHEMA.names].reset_index(drop=True)

    def _excluded(self, name: str, table: "pd.DataFrame", where: str) -> bool:
        for pattern in self.exclude:
            if not any(fnmatchcase(other, pattern) for other in table["name"]):
                raise ConfigError(f"{where}.exclude: {pattern!r} matches no module; names look like {name!r}")
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)


def make_module_table(context: StageContext, name: str, method: Drop) -> None:
    """Write ``run.module_table(name)``; files that another method left under this name are removed.

    Raises:
        ArtifactError: the table of layers is missing, damaged or of another model.
        ConfigError: a pattern of ``exclude`` matches no module, or all modules are excluded.
    """
    from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
    from evopress.artifacts.tables import LAYERS, read_provenance, read_table, write_table
    from evopress.artifacts.tables import MODULES as SCHEMA
    from evopress.models.checkpoint import Checkpoint

    run = context.run
    require_same_model(run, read_provenance(run.layers), run.layers)
    layers = read_table(run.layers, LAYERS)
    checkpoint = Checkpoint(run.model)
    sizes = checkpoint.sizes()
    stored = layers["name"].map(lambda layer: sizes[checkpoint.stored_name(f"{layer}.weight") or layer])
    table = method.module_table(layers.assign(bytes=stored), f"variants.{name}")
    path = run.module_table(name)
    for pattern in ("*.safetensors", "*.json", "block_*.parquet"):
        for other in path.parent.glob(pattern):
            other.unlink()
    provenance = Provenance("variants", method.model_dump_json(), read_model_fingerprint(run))
    write_table(table, path, SCHEMA, provenance)
    log.info("variants %s: %d modules in %d units may be dropped", name, len(table), table["unit"].nunique())


def _running_order(column: "pd.Series[Any]") -> "pd.Series[Any]":
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
