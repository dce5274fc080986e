"""What a way to compress consists of: layers, their levels, the method that makes them, its family, a storage format.

A **method** is the pydantic class of its settings: it says which levels a layer can have, makes the variants of layers
that share an input, and answers what that takes. Its **family** says what a level counts, turns a target into an exact
budget, and has the words for it. A **format** packs and unpacks weights and knows their bytes. To add one, write a file
in `methods/` or `formats/` and name it in the registry there (docs/extending.md).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from evopress.config.base import Section

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor

GroupRule = Literal["size", "name", "none"]
"""Who may trade levels: layers of the same ``size``, of the same ``name`` (q_proj), or all (``none``)."""


@dataclass(frozen=True)
class LayerShape:
    """A linear layer, known from the model's config alone."""

    name: str
    """In the model, as in `model.layers.0.self_attn.q_proj`."""
    block: int
    layer: str
    """Name inside the block."""
    input_group: str
    """Layer inside the block whose input this one shares."""
    rows: int
    columns: int
    itemsize: int
    """Bytes of a dense weight."""

    @property
    def parameters(self) -> int:
        """Weights of the layer."""
        return self.rows * self.columns


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
    """Relative output error of the unit alone; NaN where none is known."""


@dataclass(frozen=True)
class Unit:
    """Something that has levels: a linear layer, or modules that are kept or dropped together."""

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

    name: ClassVar[str]
    """As tables record it."""

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


class Method(Section):
    """A way to make compressed variants; a subclass has a field ``method: Literal["its-name"]``."""

    family: ClassVar[Family]
    method: str = ""
    exclude: tuple[str, ...] = Field((), description="Patterns of names that stay dense, as in `*.down_proj`.")

    def labels(self) -> list[str]:
        """Labels of the levels that a unit with room for all of them has."""
        raise NotImplementedError

    def target_problems(self, target: float, where: str) -> Iterator[str]:
        """Why a search over these levels cannot have ``target``; as far as that is known without a model."""
        yield from ()


class LayerMethod(Method):
    """A method that makes new weights of linear layers."""

    def levels_of(self, layer: LayerShape) -> list[Level]:
        """Levels of a layer, with exact costs and bytes.

        Raises:
            CompressionError: the layer cannot have them.
        """
        raise NotImplementedError

    def compress(self, weights: "Mapping[str, Tensor]", hessian: "Tensor", memory: float) -> list[Variant]:
        """All variants of layers that share their input.

        Args:
            weights: finite weights [rows, columns] by layer, all with the same columns.
            hessian: X^T X of their input, [columns, columns], on the device that does the work.
            memory: bytes that the work may take beside weights and Hessian.

        Raises:
            CompressionError: the layers cannot be compressed as asked.
        """
        raise NotImplementedError

    def peak_bytes(self, layers: Sequence[LayerShape], memory: float) -> int:
        """Most bytes that `compress` holds for layers that share their input, weights and Hessian included."""
        raise NotImplementedError

    def operations(self, layers: Sequence[LayerShape]) -> float:
        """Multiplications and additions of `compress`."""
        raise NotImplementedError


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
