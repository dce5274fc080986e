"""What a way to compress consists of: levels, the method that makes them, its family, a storage format.

A **method** is the pydantic class of its settings: it says which levels a layer can have, makes the variants of layers
that share an input, and answers what that takes. Its **family** says what a level counts, turns a target into an exact
budget, and has the words for it. A **format** packs and unpacks weights and knows their bytes. To add one, write a file
in `methods/` or `formats/` and name it in the registry there (docs/extending.md).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from evopress.compression.layers import LayerShape, layer_shapes
from evopress.config.base import Section
from evopress.util.errors import CompressionError, ConfigError

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor

INTEGERS = "int"
"""How the names of formats begin that hold integers with a scale for a group of inputs of each row."""
PASSES = 2
"""Further ones over the columns (`descent`), where the settings do not say: later ones gain little."""
GroupRule = Literal["size", "name", "none"]
"""Who may trade levels: layers of the same ``size``, of the same ``name`` (q_proj), or all (``none``)."""


@dataclass(frozen=True)
class Level:
    """One way to compress a unit."""

    label: str
    value: float
    """What people read: bits per weight without overhead, sparsity, or 1 for a module that is dropped."""
    cost: int
    """What the budget counts, as in bits x weights."""
    bytes: int
    """Exact size of the stored tensors."""
    error: float = math.nan
    """Relative output error of the unit alone, summed over its layers; NaN where none is known."""
    source: str = ""
    """Variants that it is of, in a search over several; else empty."""


@dataclass(frozen=True)
class Unit:
    """Something that has levels: a linear layer, several that share a level, or modules that are dropped together."""

    name: str
    block: int
    layer: str
    """Name inside the block."""
    group: str
    """Units of the same group may trade levels."""
    parameters: int
    levels: tuple[Level, ...]
    """By rising cost."""
    modules: tuple[tuple[int, str], ...] = ()
    """Modules that leave the model at the lowest level, as (block, kind); none where the unit is a linear layer."""
    members: "tuple[Unit, ...]" = ()
    """Linear layers that share its level, each with its own costs; none where it is a single layer, or modules."""

    @property
    def layers(self) -> "tuple[Unit, ...]":
        """Its linear layers, as units of their own; their levels have the same indices."""
        return self.members or (self,)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks whose output its level changes at first hand."""
        return tuple(dict.fromkeys(block for block, _ in self.modules)) or (self.block,)


@dataclass(frozen=True)
class Variant:
    """A linear layer at one level, packed."""

    layer: str
    """Name inside the block."""
    level: str
    """Label, as in tables and names of tensors."""
    value: float
    cost: int
    parameters: int
    format: str
    """Text form of the format in which the parts are packed."""
    parts: "dict[str, Tensor]"
    error: float
    """Relative output error tr(dW H dW^T) / tr(W H W^T)."""
    damping: float

    @property
    def bytes(self) -> int:
        """Exact size of the parts."""
        return sum(part.nbytes for part in self.parts.values())


class Family(ABC):
    """What levels count, and the words for it. Methods of one family can take each other's place in a search."""

    name: str
    """As tables record it."""
    takes_modules: ClassVar[bool] = False
    """Whether the lowest level takes modules out of the model; else levels are other weights of a linear layer."""
    asked: ClassVar[str]
    """What a target counts, as in `bits per weight`."""
    introduction: ClassVar[str]
    """Sentences of the model card that lead up to how the levels were chosen."""
    size: ClassVar[str]
    """What the model card calls the size of the compressed model."""
    level_map: ClassVar[str]
    """Caption of the figure that shows the level of each unit."""

    @abstractmethod
    def units(self, table: "pd.DataFrame", group_rule: GroupRule) -> tuple[Unit, ...]:
        """Units of a table of variants (VARIANTS or MODULES schema), ordered by block."""

    @abstractmethod
    def budgets(self, units: Sequence[Unit], target: float, where: str) -> tuple[int, ...]:
        """Most that each group of units may cost (groups in order of first appearance).

        Args:
            units: what is searched.
            target: as the user wrote it.
            where: dotted path of the search's settings, for messages.

        Raises:
            ConfigError: there is nothing to search, or no choice of levels can meet the target.
        """

    @abstractmethod
    def average(self, cost: int, parameters: int) -> float:
        """What people read, from the total cost of some units and their weights."""

    @abstractmethod
    def describe(self, units: Sequence[Unit], levels: Sequence[int]) -> str:
        """What a choice of ``levels`` (indices, one per unit) comes to, in words."""

    @abstractmethod
    def excess(self, cost: int, units: Sequence[Unit], target: float) -> str:
        """By how much a choice misses the target, in words, where it costs so much more than the budget."""

    @abstractmethod
    def reached(self, rows: "pd.DataFrame") -> str:
        """What the rows of a configuration (CONFIGURATION schema) come to, as the report says after what was asked."""


class Method(Section):
    """A way to make compressed variants; a subclass has a field ``method: Literal["its-name"]``."""

    family: ClassVar[Family]
    per_block: ClassVar[bool] = False
    """Whether there is a job and a file for each block; else one table for the whole model."""
    formats: ClassVar[str] = ""
    """How the names of the formats of all its variants begin, where an exporter asks for a certain kind."""
    gains_by_polish: ClassVar[bool] = False
    """Whether a polish takes so much off the divergence that `strategy: auto` asks for one."""

    method: str = ""
    exclude: tuple[str, ...] = Field((), description="Patterns of names that stay dense, as in `*.down_proj`.")

    @property
    def sequential(self) -> bool:
        """Whether the jobs of blocks run one after the other, each on what the one before has left."""
        return False

    @property
    def needs_hessians(self) -> bool:
        """Whether the variants are made from the Hessians of the dense model."""
        return False

    @property
    def compresses_embedding(self) -> bool:
        """Whether the input embedding and the head have levels, too: what a setting `embedding` says."""
        return bool(getattr(self, "embedding", False))

    def files(self) -> dict[str, str]:
        """Files of the user's own that it reads, by the setting that names each."""
        return {}

    def labels(self) -> list[str]:
        """Labels of the levels that a unit with room for all of them has."""
        raise NotImplementedError

    def limited(self, labels: Collection[str]) -> Self:
        """The same method with the levels ``labels`` alone, or with more where it cannot leave any out."""
        return self

    def for_embedding(self) -> Self:
        """The same method as embedding and head need it: nothing is made up for between their columns."""
        return self

    def target_problems(self, target: float, where: str) -> Iterator[str]:
        """Say why a search over these levels cannot have ``target``; as far as that is known without a model.

        Args:
            target: of the search.
            where: dotted path of the search's settings, with which each problem begins.
        """
        yield from ()

    def excludes(self, name: str) -> bool:
        """Whether a layer of this name stays dense."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def table(self, layers: "pd.DataFrame", itemsize: int, where: str) -> "pd.DataFrame":
        """What the family's units are made of, known from the model's config alone.

        Args:
            layers: of the model, LAYERS schema.
            itemsize: bytes of a dense weight.
            where: dotted path of the settings, for messages.

        Raises:
            ConfigError: a unit cannot have these levels; the message names it.
        """
        raise NotImplementedError

    def check(self, layers: Sequence[LayerShape], model: Sequence[LayerShape]) -> None:
        """Refuse layers that cannot have the levels, before any work is done.

        Args:
            layers: those that are about to be compressed.
            model: all layers that are compressed with these settings; what an error offers suits them, too.

        Raises:
            CompressionError: a layer cannot have the levels; the message names it.
        """

    def peak_bytes(self, layers: Sequence[LayerShape], memory: float) -> int:
        """Most bytes that making the variants of layers that share their input takes, given ``memory`` for work."""
        return 0

    def operations(self, layers: Sequence[LayerShape]) -> float:
        """Multiplications and additions that this takes."""
        return 0.0


class LayerMethod(Method):
    """A method that makes new weights of linear layers."""

    per_block = True

    propagation: Literal["dense", "sequential"] = Field(
        "dense",
        description="Whose outputs the Hessians of a block see: those of the dense blocks before it, or of the "
        "compressed ones at `propagation_level`, block after block, in a chain of jobs with Hessians of its own.",
    )
    propagation_level: str | None = Field(
        None, description='With `propagation: sequential`, the level, as in `"3"` (bits), `"0"` or `"2:4"`.'
    )

    @model_validator(mode="after")
    def _check_propagation(self) -> Self:
        level, labels = self.propagation_level, self.labels()
        if not self.sequential and level is not None:
            raise ValueError("propagation_level: nothing is compressed underway; set `propagation: sequential` as well")
        if self.sequential and level not in labels:
            what = "needed with `propagation: sequential`" if level is None else f"{level!r} is not made"
            raise ValueError(f"propagation_level: {what}; choose one of {', '.join(labels)} (in quotes)")
        return self

    @property
    def sequential(self) -> bool:
        """Whether the Hessians of a block see the compressed blocks before it."""
        return self.propagation == "sequential"

    @property
    def needs_hessians(self) -> bool:
        """Unless the jobs make their own."""
        return not self.sequential

    def levels_of(self, layer: LayerShape) -> list[Level]:
        """Levels of a layer, with exact costs and bytes.

        Raises:
            CompressionError: the layer cannot have them.
        """
        raise NotImplementedError

    def check_inputs(self, columns: int, everywhere: Collection[int]) -> None:
        """Refuse layers of so many inputs that cannot have the levels, whatever their other sizes.

        Args:
            columns: inputs of the layers.
            everywhere: inputs of all layers that are compressed; what an error offers suits them, too.

        Raises:
            CompressionError: the layers cannot have the levels.
        """

    def check(self, layers: Sequence[LayerShape], model: Sequence[LayerShape]) -> None:
        """Refuse layers that cannot have the levels, before any work is done.

        Args:
            layers: those that are about to be compressed.
            model: all layers that are compressed with these settings.

        Raises:
            CompressionError: a layer cannot have the levels; the message names it.
        """
        everywhere = list(dict.fromkeys(layer.columns for layer in model))
        for layer in layers:
            try:
                self.check_inputs(layer.columns, everywhere)
                self.levels_of(layer)
            except CompressionError as error:
                raise CompressionError(f"{layer.name}: {error}") from error

    def compress(self, weights: "Mapping[str, Tensor]", hessian: "Tensor", memory: float = math.inf) -> "list[Variant]":
        """All variants of layers that share their input.

        Args:
            weights: finite weights [rows, columns] by layer, all with the same columns.
            hessian: X^T X of their input, [columns, columns], on the device that does the work.
            memory: bytes that the work may take beside weights and Hessian.

        Raises:
            CompressionError: the layers cannot be compressed as asked.
        """
        raise NotImplementedError

    def given_hessians(self, model: Path, layers: "pd.DataFrame", block: int) -> "dict[str, Tensor]":
        """What stands for the Hessian of each input group of a block, where a method needs none of the model's.

        Args:
            model: folder of the model.
            layers: all its linear layers, LAYERS schema.
            block: index of the block.

        Raises:
            ConfigError: what the settings name does not fit the model; the message begins with the setting.
        """
        raise NotImplementedError

    def peak_bytes(self, layers: Sequence[LayerShape], memory: float) -> int:
        """Most bytes that `compress` holds for layers that share their input, weights and Hessian included."""
        raise NotImplementedError

    def operations(self, layers: Sequence[LayerShape]) -> float:
        """Multiplications and additions of `compress`."""
        raise NotImplementedError

    def table(self, layers: "pd.DataFrame", itemsize: int, where: str) -> "pd.DataFrame":
        """One row for each layer and level, in the order of ``layers``: what the VARIANTS schema has beforehand."""
        import pandas as pd

        rows = []
        for layer in layer_shapes(layers, itemsize):
            if self.excludes(layer.name):
                continue
            try:
                levels = self.levels_of(layer)
            except CompressionError as error:
                raise ConfigError(f"{where}: {layer.name}: {error}") from error
            own = {"block": layer.block, "layer": layer.layer, "name": layer.name, "parameters": layer.parameters}
            rows += [
                own | {"level": level.label, "value": level.value, "cost": level.cost, "bytes": level.bytes}
                for level in levels
            ]
        columns = ["block", "layer", "name", "level", "value", "cost", "parameters", "bytes"]
        return pd.DataFrame(rows, columns=columns).assign(family=self.family.name)


class Format(ABC):
    """How the tensors of a variant are packed. ``str(format)`` is its name in tables, which `parse` reads."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> "Format | None":
        """The format of this name; None if it is another one's."""

    @abstractmethod
    def decode(self, parts: "Mapping[str, Tensor]", shape: tuple[int, int], dtype: "torch.dtype") -> "Tensor":
        """Weights [rows, columns] in ``dtype``, on the device of the parts.

        Raises:
            ArtifactError: the parts do not fit the format and the shape.
        """
