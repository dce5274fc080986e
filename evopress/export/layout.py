"""Which tensors of the dense checkpoint a stitched one holds, under what names, once modules are dropped."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from evopress.compression.dropped import Dropped, block_tensors, stored_prefix
from evopress.models.checkpoint import Checkpoint
from evopress.util.errors import UnsupportedArchitectureError


@dataclass(frozen=True)
class Layout:
    """Tensors of a stitched checkpoint."""

    names: Mapping[str, str]
    """Name of each tensor in it, by the name under which the dense checkpoint stores it; the others are left out."""
    zeroed: frozenset[str] = frozenset()
    """Those (by the dense name) that hold zeros."""


def dense_layout(checkpoint: Checkpoint) -> Layout:
    """Every tensor under its own name."""
    return Layout({name: name for name in checkpoint.names()})


def depth_layout(checkpoint: Checkpoint, layers: pd.DataFrame, dropped: Dropped, hidden_size: int) -> Layout:
    """Blocks that lost both modules are gone and the later ones renumbered; other dropped modules give out zeros.

    Args:
        checkpoint: of the dense model.
        layers: columns of LAYERS.
        dropped: what goes.
        hidden_size: numbers per token between blocks.

    Raises:
        ArtifactError: the checkpoint does not hold the layers of the table.
        UnsupportedArchitectureError: a module's output projection cannot be told.
    """
    outputs = {output_projection(layers, block, kind, hidden_size) for block, kind in dropped.single}
    tensors = block_tensors(checkpoint, layers)
    zeroed = (name for name, (block, inner) in tensors.items() if f"{block}.{inner.rpartition('.')[0]}" in outputs)
    return Layout(renumbered(checkpoint, layers, dropped), frozenset(zeroed))


def renumbered(checkpoint: Checkpoint, layers: pd.DataFrame, dropped: Dropped) -> dict[str, str]:
    """New name of each tensor outside the blocks and in the blocks that are kept.

    Raises:
        ArtifactError: the checkpoint does not hold the layers of the table.
    """
    prefix, tensors = stored_prefix(checkpoint, layers), block_tensors(checkpoint, layers)
    numbers = {block: number for number, block in enumerate(dropped.kept)}
    names = {}
    for name in checkpoint.names():
        if name not in tensors:
            names[name] = name
        elif tensors[name][0] in numbers:
            block, inner = tensors[name]
            names[name] = f"{prefix}{numbers[block]}.{inner}"
    return names


def output_projection(layers: pd.DataFrame, block: int, kind: str, hidden_size: int) -> str:
    """The linear layer, as in `3.self_attn.o_proj`, whose output is the module's: the last to run, of hidden size.

    Raises:
        UnsupportedArchitectureError: the module's last layer does not give hidden states.
    """
    inside = layers[(layers["block"] == block) & (layers["module"] == kind)]
    last = inside.iloc[-1]
    if last["rows"] != hidden_size:
        raise UnsupportedArchitectureError(
            f"{last['name']}: the last layer of this module gives {last['rows']} numbers per token, not hidden states "
            f"({hidden_size}), so its output cannot be stored as zeros; drop whole blocks (unit: block)"
        )
    return f"{block}.{last['layer']}"
