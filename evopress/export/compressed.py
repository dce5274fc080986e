"""The compressed model that a search has chosen, tensor by tensor: what every exporter writes in some form.

Nothing here knows how the configuration was found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import LAYERS, read_table
from evopress.compression.dropped import Dropped, block_tensors, dropped_modules, idle_tensors, stored_prefix
from evopress.compression.families import of_modules
from evopress.compression.store import VariantStore
from evopress.config.context import StageContext
from evopress.export.base import ExportContext
from evopress.models.checkpoint import Checkpoint
from evopress.models.skeleton import load_config
from evopress.models.verify import check_model, check_weight
from evopress.search.configuration import Configuration
from evopress.util.errors import ArtifactError, UnsupportedArchitectureError


class Choice(NamedTuple):
    """The variant that takes the place of one stored tensor."""

    variants: str
    block: int
    layer: str
    level: str


@dataclass(frozen=True)
class Layout:
    """Tensors of a checkpoint without the modules that were dropped."""

    names: Mapping[str, str]
    """Name of each tensor in it, by the name under which the dense checkpoint stores it; the others are left out."""
    zeroed: frozenset[str] = frozenset()
    """Those (by the dense name) that hold zeros."""
    idle: frozenset[str] = frozenset()
    """Those (by the dense name) that change nothing, whatever they hold: of modules that give zeros."""


class CompressedModel:
    """The dense checkpoint with the chosen variant of every searched layer in its place, without what was dropped.

    In an `ExportContext` that says so, the variants are those that the search's polish has made.
    Blocks that lost both modules are gone; a module dropped alone stays, with an output projection of zeros. Each
    tensor that is read is compared with its digest.
    """

    def __init__(self, context: StageContext, search: str) -> None:
        """Open what a search has chosen.

        Raises:
            ArtifactError: the configuration or a variant is missing, damaged or of another model.
            ModelError: the dense checkpoint is damaged.
            UnsupportedArchitectureError: this architecture cannot do without what was dropped.
        """
        run = context.run
        self.run = run
        self.configuration = Configuration.read(run, search).table
        self.checkpoint = Checkpoint(run.model)
        self.dropped = _read_dropped(run, self.configuration)
        self.layout = _layout(context, self.checkpoint, self.dropped)
        """Names under which its tensors are stored."""
        every = _choices(self.checkpoint, self.configuration, run.configuration(search))
        stored = self.layout.names.keys() - self.layout.zeroed
        self.choices: dict[str, Choice] = {name: choice for name, choice in every.items() if name in stored}
        """The variant in the place of each compressed tensor, by the name that the dense checkpoint has for it."""
        self._digests = check_model(run)
        names = sorted({choice.variants for choice in self.choices.values()})
        polished = search if isinstance(context, ExportContext) and context.polished else None
        self._stores = {name: VariantStore(run, name, verify=True, polished=polished) for name in names}

    def weight(self, name: str, dense: Tensor) -> Tensor:
        """What to store in the place of a dense tensor: zeros, the chosen variant in its type, or the tensor itself.

        Args:
            name: of the tensor in the dense checkpoint.
            dense: as stored there.

        Raises:
            ArtifactError: a variant is damaged, or does not fit the tensor.
            DamagedError: the dense tensor is not what was imported.
        """
        if name in self.layout.zeroed:
            return torch.zeros_like(dense)
        if name not in self.choices:
            return check_weight(self.run, self._digests, name, dense)
        variants, block, layer, level = self.choices[name]
        weight = self._stores[variants].weight(block, layer, level, dense.device, dense.dtype)
        if weight.shape != dense.shape:
            raise ArtifactError(
                f"variants {variants!r}: block {block} {layer} level {level} is {list(weight.shape)}, the model's "
                f"layer is {list(dense.shape)}; delete these variants and run again"
            )
        return weight

    def format(self, name: str) -> str:
        """Format of the variant that takes the place of a compressed tensor, as the table of variants names it."""
        variants, block, layer, level = self.choices[name]
        return self._stores[variants].format(block, layer, level)

    def packed(self, name: str) -> tuple[str, dict[str, Tensor]]:
        """Format and parts of the variant that takes the place of a compressed tensor.

        Raises:
            ArtifactError: the variant is damaged.
        """
        variants, block, layer, level = self.choices[name]
        store = self._stores[variants]
        return store.format(block, layer, level), store.packed(block, layer, level)


def _read_dropped(run: Run, configuration: pd.DataFrame) -> Dropped | None:
    """What a configuration drops; None where it holds no modules."""
    if not of_modules(configuration).any():
        return None
    return dropped_modules(configuration, read_table(run.layers, LAYERS))


def _layout(context: StageContext, checkpoint: Checkpoint, dropped: Dropped | None) -> Layout:
    """Which tensors the compressed checkpoint holds."""
    if dropped is None:
        return Layout({name: name for name in checkpoint.names()})
    config = load_config(context.run.model, trust_remote_code=context.trust_remote_code)
    layers = read_table(context.run.layers, LAYERS)
    return depth_layout(checkpoint, layers, dropped, config.get_text_config().hidden_size)


def _choices(checkpoint: Checkpoint, configuration: pd.DataFrame, path: Path) -> dict[str, Choice]:
    """Map the stored name of each searched layer's weight to the variant chosen for it; ``path`` is for messages."""
    choices: dict[str, Choice] = {}
    for row in configuration[~of_modules(configuration)].to_dict("records"):
        stored = checkpoint.stored_name(f"{row['unit']}.weight")
        if stored is None or stored in choices:
            problem = "is no layer of the model" if stored is None else "appears twice"
            raise ArtifactError(f"{path}: unit {row['unit']!r} {problem}; delete it and run the search again")
        choices[stored] = Choice(row["variants"], row["block"], row["layer"], row["level"])
    return choices


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
    names = renumbered(checkpoint, layers, dropped)
    return Layout(names, frozenset(zeroed), idle_tensors(checkpoint, layers, dropped) & names.keys())


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
