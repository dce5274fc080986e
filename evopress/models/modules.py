"""The attention and MLP modules of a block: what depth pruning may take out of it."""

from collections.abc import Iterable
from dataclasses import dataclass

from evopress.artifacts.paths import EMBEDDING

ATTENTION, MLP = "attn", "mlp"
KINDS = (ATTENTION, MLP)
"""Kinds of modules, in the order in which a block runs them."""
HEAD = "head"
"""Layer and input group of the head; the input embedding is the layer `EMBEDDING`."""
OUTER = (EMBEDDING, HEAD)
"""Layers outside of the blocks."""
_MIXERS = ("attn", "attention", "conv", "mamba", "temporal")
"""Words in the names of attention modules, and of those that stand in their place in hybrid models."""


@dataclass(frozen=True)
class Module:
    """One attention or MLP module of a block; names are those inside the block."""

    kind: str
    containers: tuple[str, ...]
    """Children of the block that hold its linear layers."""
    loose: tuple[str, ...]
    """Linear layers that lie in the block itself (OPT's MLP)."""
    layers: tuple[str, ...]
    """All its linear layers."""


def module_kind(layer: str) -> str:
    """`attn` for a linear layer inside a child of the block that mixes tokens, else `mlp` (OPT's has no child)."""
    child, _, rest = layer.partition(".")
    return ATTENTION if rest and any(word in child for word in _MIXERS) else MLP


def module_name(block: str, kind: str) -> str:
    """Name of a module, the same on every architecture, as in `model.layers.3.attn`."""
    return f"{block}.{kind}"


def modules_of(layers: Iterable[str]) -> dict[str, Module]:
    """Modules of a block by kind, from the names of its linear layers."""
    members: dict[str, list[str]] = {}
    for layer in layers:
        members.setdefault(module_kind(layer), []).append(layer)
    return {kind: _module(kind, members[kind]) for kind in KINDS if kind in members}


def _module(kind: str, layers: list[str]) -> Module:
    containers = dict.fromkeys(layer.partition(".")[0] for layer in layers if "." in layer)
    loose = tuple(layer for layer in layers if "." not in layer)
    return Module(kind, tuple(containers), loose, tuple(layers))
