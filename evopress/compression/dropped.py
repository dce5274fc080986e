"""Modules and blocks that a configuration takes out of a model, and the tensors that go with them."""

from dataclasses import dataclass

import pandas as pd

from evopress.compression.families import DROP, of_modules
from evopress.models.checkpoint import Checkpoint
from evopress.util.errors import ArtifactError


@dataclass(frozen=True)
class Dropped:
    """What depth pruning takes out of a model; modules are pairs of a block and a kind (`attn`, `mlp`)."""

    modules: frozenset[tuple[int, str]]
    """The dropped ones."""
    all_modules: frozenset[tuple[int, str]]
    """Those of the dense model."""

    @property
    def blocks(self) -> int:
        """Number of blocks of the dense model."""
        return 1 + max(block for block, _ in self.all_modules)

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks with at least one module left, in order; their positions here are their new numbers."""
        return tuple(sorted({block for block, _ in self.all_modules - self.modules}))

    @property
    def single(self) -> list[tuple[int, str]]:
        """Dropped modules of blocks that are kept."""
        return sorted(module for module in self.modules if module[0] in self.kept)

    def whole_blocks(self) -> "Dropped":
        """The same without the modules that were dropped alone."""
        return Dropped(self.modules - set(self.single), self.all_modules)

    def count(self, kind: str) -> int:
        """Number of dropped modules of a kind."""
        return sum(dropped == kind for _, dropped in self.modules)

    def total(self, kind: str) -> int:
        """Number of modules of a kind in the dense model."""
        return sum(module == kind for _, module in self.all_modules)


def dropped_modules(configuration: pd.DataFrame, layers: pd.DataFrame) -> Dropped:
    """Read what a configuration drops; modules that it does not list stay.

    Args:
        configuration: columns of CONFIGURATION; rows of modules have the level keep or drop.
        layers: columns of LAYERS.

    Raises:
        ArtifactError: a module is listed twice or is none of the model's, or no block is left.
    """
    rows = configuration[of_modules(configuration)]
    every = frozenset(zip(layers["block"].astype(int), layers["module"].astype(str), strict=True))
    listed = list(zip(rows["block"].astype(int), rows["layer"].astype(str), strict=True))
    for block, kind in listed:
        if (block, kind) not in every or listed.count((block, kind)) > 1:
            problem = "is listed twice" if (block, kind) in every else "is no module of the model"
            raise ArtifactError(f"configuration: {kind} of block {block} {problem}; delete it and run the search again")
    drop = rows["level"] == DROP
    dropped = Dropped(frozenset(module for module, gone in zip(listed, drop, strict=True) if gone), every)
    if not dropped.kept:
        raise ArtifactError("configuration: drops every block of the model; search again with a smaller target")
    return dropped


def block_tensors(checkpoint: Checkpoint, layers: pd.DataFrame) -> dict[str, tuple[int, str]]:
    """Block of each stored tensor that lies in one, and its name inside it.

    Raises:
        ArtifactError: the checkpoint does not hold the layers of the table.
    """
    prefix = stored_prefix(checkpoint, layers)
    found = {}
    for name in checkpoint.names():
        number, _, inner = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdigit():
            found[name] = (int(number), inner)
    return found


def stored_prefix(checkpoint: Checkpoint, layers: pd.DataFrame) -> str:
    """What comes before the number of a block in the names of stored tensors, as in `model.layers.`.

    Raises:
        ArtifactError: the checkpoint does not hold the layers of the table.
    """
    first = layers.iloc[0]
    inner = f"{first['block']}.{first['layer']}.weight"
    stored = checkpoint.stored_name(f"{first['name']}.weight")
    if stored is None or not stored.endswith(f".{inner}"):
        raise ArtifactError(f"{checkpoint.folder}: has no layer {first['name']!r}; delete layers.parquet and run again")
    return stored.removesuffix(inner)


def idle_tensors(checkpoint: Checkpoint, layers: pd.DataFrame, dropped: Dropped) -> frozenset[str]:
    """Stored tensors without any effect: all of blocks that are gone, and those of dropped modules' linear layers.

    Raises:
        ArtifactError: the checkpoint does not hold the layers of the table.
    """
    keys = zip(layers["block"], layers["layer"], strict=True)
    kinds = dict(zip(keys, layers["module"], strict=True))
    return frozenset(
        name
        for name, (block, inner) in block_tensors(checkpoint, layers).items()
        if block not in dropped.kept or (block, kinds.get((block, inner.rpartition(".")[0]))) in dropped.modules
    )
