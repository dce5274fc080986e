"""GGUF: the types that llama.cpp runs, one level each."""

import difflib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from evopress.compression.base import PASSES, LayerMethod, Level, Variant
from evopress.compression.families import BITS
from evopress.compression.gguf_types import GGUF_TYPES, possible_types
from evopress.compression.layers import LayerShape, sweep_operations
from evopress.config.base import UserPath

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from evopress.compression.gguf_rounding import GgufQuantized

_BYTES_PER_CODE = 8
"""Peak memory of a sweep per type and weight: the float32 panel, codes and their copy, grids, ..."""
_BYTES_OF_PASSES = 14
"""... more than that with further passes: two more panels, and what a matrix product takes, ..."""
_BYTES_PER_WEIGHT = 16
"""... and per weight: its rows in the order of the sweep, with a copy, and what the fit of a grid takes."""
_FIT_OPERATIONS = 300
"""Of the fit of a grid, per type and weight."""
_ROUNDING_OPERATIONS = 2000
"""Of libgguf, per type and weight: about a microsecond of one core."""


class Gguf(LayerMethod):
    """Types of GGUF files, which llama.cpp runs."""

    family = BITS
    formats = "gguf-"
    method: Literal["gguf"] = "gguf"
    types: tuple[str, ...] = Field(
        ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "IQ4_NL", "Q5_K", "Q5_0", "Q6_K", "Q8_0"),
        min_length=1,
        description="Types to offer. A layer has those whose blocks fill its rows: its inputs must be a multiple of "
        "256 for the types with a K and all IQ types but IQ4_NL, and of 32 for the others.",
    )
    rounding: Literal["gptq", "rtn"] = Field(
        "gptq",
        description="`gptq` makes up for the error of each column in the others. `rtn` rounds to nearest as llama.cpp "
        "does, with the Hessian's diagonal as importance; it needs `libgguf`, and has the types with codebooks, too.",
    )
    imatrix: UserPath | None = Field(
        None,
        description="With `rtn`, an imatrix file of this model, as `llama-imatrix` or `evopress export-imatrix` writes "
        "it: its importances take the place of the Hessians, which are not needed then.",
    )
    embedding: bool = Field(
        True,
        description="Whether the input embedding and the head have types as well; one that is tied to the other is one "
        "unit. They are rounded to nearest, with the head's inputs as importance.",
    )
    activation_order: bool = Field(True, description="With `gptq`, round columns by decreasing Hessian diagonal.")
    damping: float = Field(0.01, gt=0, lt=1, description="Share of the mean Hessian diagonal added to the diagonal.")
    block_size: int = Field(128, ge=1, description="Columns between two lazy updates of the remaining ones.")
    passes: int = Field(
        PASSES,
        ge=0,
        description="With `gptq`, further passes over the columns, each of which fits the float16 numbers of all "
        "blocks anew and rounds every column again, given all others, so that the layer's error falls (coordinate "
        "descent, as in QuantEase); 0 is GPTQ as published.",
    )

    @field_validator("types")
    @classmethod
    def _check_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        for name in types:
            if name in GGUF_TYPES:
                continue
            if name.rsplit("_", 1)[0] in GGUF_TYPES:
                raise ValueError(f"{name!r} is a mixture of types, which a search makes itself; name types, as in Q4_K")
            near = difflib.get_close_matches(name.upper(), GGUF_TYPES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(GGUF_TYPES)}"
            raise ValueError(f"unknown type {name!r}: {hint}")
        if len(set(types)) != len(types):
            raise ValueError(f"a type is named twice in {list(types)}")
        return tuple(sorted(types, key=lambda name: GGUF_TYPES[name].bits))

    @model_validator(mode="after")
    def _check_rounding(self) -> Self:
        without = [name for name in self.types if GGUF_TYPES[name].grid is None]
        if self.rounding == "gptq" and without:
            raise ValueError(
                f"types: {', '.join(without)} take weights from codebooks, which `rounding: gptq` does not do; leave "
                "them out, or choose `rounding: rtn`"
            )
        return self

    @model_validator(mode="after")
    def _check_imatrix(self) -> Self:
        if self.imatrix is not None and self.rounding == "gptq":
            raise ValueError("imatrix: `rounding: gptq` needs whole Hessians; choose `rounding: rtn`, or remove it")
        if self.imatrix is not None and self.sequential:
            raise ValueError("imatrix: `propagation: sequential` observes inputs itself; remove one of the two")
        return self

    @property
    def needs_hessians(self) -> bool:
        """Unless there is an imatrix, or the jobs make their own."""
        return super().needs_hessians and self.imatrix is None

    def files(self) -> dict[str, str]:
        """The imatrix."""
        return {} if self.imatrix is None else {"imatrix": self.imatrix}

    def given_hessians(self, model: Path, layers: "pd.DataFrame", block: int) -> "dict[str, Tensor]":
        """Diagonal matrices with the importances of the imatrix."""
        from evopress.compression.imatrix import diagonal_hessians

        assert self.imatrix is not None
        return diagonal_hessians(Path(self.imatrix), model, layers, block)

    def labels(self) -> list[str]:
        """Types."""
        return list(self.types)

    def limited(self, labels: Collection[str]) -> Self:
        """Those of its types."""
        return self.model_copy(update={"types": tuple(name for name in self.types if name in labels)})

    def for_embedding(self) -> Self:
        """Without further passes, which have little to gain there."""
        return self.model_copy(update={"passes": 0})

    def target_problems(self, target: float, where: str) -> Iterator[str]:
        """A target below the bits per weight of the smallest type, or above those of the largest."""
        for name, beyond, word in ((self.types[0], -1, "below"), (self.types[-1], 1, "above")):
            if (target - GGUF_TYPES[name].bits) * beyond > 0:
                end = "smallest" if beyond < 0 else "largest"
                yield (
                    f"{where}.target: {target:g} bits is {word} the {end} type ({name}, {GGUF_TYPES[name].bits:g} bits "
                    "with its scales)"
                )

    def levels_of(self, layer: LayerShape) -> list[Level]:
        """The types whose blocks fill the layer's rows, with all that a file stores of them.

        Raises:
            CompressionError: there are none.
        """
        levels = []
        for kind in possible_types(self.types, layer.columns):
            size = layer.rows * kind.row_bytes(layer.columns)
            levels.append(Level(kind.name, kind.bits, 8 * size, size))
        return levels

    def compress(self, weights: "Mapping[str, Tensor]", hessian: "Tensor", memory: float = math.inf) -> list[Variant]:
        """Quantize the layers, stacked by rows, to all of their types."""
        import torch

        stacked = torch.cat(list(weights.values())).float()
        energies = torch.einsum("rc,rc->r", stacked @ hessian.float(), stacked).double()
        return list(self._variants(weights, self._quantized(stacked, hessian, memory), energies))

    def _quantized(self, stacked: "Tensor", hessian: "Tensor", memory: float) -> "list[GgufQuantized]":
        """One result for each type that the columns of ``stacked`` (float32 [rows, columns]) can have."""
        rows, columns = stacked.shape
        kinds = possible_types(self.types, columns)
        if self.rounding == "rtn":
            from evopress.compression.gguf_rounding import gguf_rtn

            return gguf_rtn(stacked, hessian, kinds)
        from evopress.compression.gguf_rounding import gguf_gptq

        height = int(min(rows, max(1.0, memory / self._sweep_bytes(len(kinds), columns))))
        order, damping, block_size = self.activation_order, self.damping, self.block_size
        return gguf_gptq(stacked, hessian, kinds, order, damping, block_size, height, self.passes)

    def _variants(
        self, weights: "Mapping[str, Tensor]", quantized: "list[GgufQuantized]", energies: "Tensor"
    ) -> Iterator[Variant]:
        """Variants of layers that were quantized together; ``energies`` [rows] are what errors are relative to."""
        from evopress.compression.formats.gguf import GgufFormat

        start = 0
        for layer, weight in weights.items():
            own = slice(start, start + len(weight))
            start = own.stop
            energy = float(energies[own].sum())
            for kind, result in zip(possible_types(self.types, weight.shape[1]), quantized, strict=True):
                blocks = result.blocks[own].cpu().clone()
                yield Variant(
                    layer=layer,
                    level=kind.name,
                    value=kind.bits,
                    cost=8 * blocks.nbytes,
                    parameters=weight.numel(),
                    format=str(GgufFormat(kind)),
                    parts={"blocks": blocks},
                    error=float(result.errors[own].sum()) / energy if energy > 0 else 0.0,
                    damping=result.damping,
                )

    def peak_bytes(self, layers: Sequence[LayerShape], memory: float) -> int:
        """With the weights, stacked in float32, their Hessian, and a sweep of one row at least."""
        columns, weights = layers[0].columns, sum(layer.parameters for layer in layers)
        kinds = possible_types(self.types, columns)
        packed = sum(kind.bits for kind in kinds) / 8 * weights
        held = 8 * weights + 4 * columns**2 + packed
        if self.rounding == "rtn":
            return int(held + 3 * 4 * weights)
        least = self._sweep_bytes(len(kinds), columns)
        sweep = min(least * sum(layer.rows for layer in layers), max(memory, least))
        # The Hessian reordered and reversed, and the factor in float64, of which a float32 copy stays; for further
        # passes, the reordered Hessian and a copy of it stay as well.
        stays = 3 if self.passes else 1
        return int(held + max((4 + 4 + 8) * columns**2, stays * 4 * columns**2 + sweep))

    def operations(self, layers: Sequence[LayerShape]) -> float:
        """Of the factor, the fit of the grids, the sweep and the relative errors."""
        columns, weights = layers[0].columns, sum(layer.parameters for layer in layers)
        kinds = possible_types(self.types, columns)
        count, offsets = len(kinds), sum(kind.grid is not None and kind.grid.offset is not None for kind in kinds)
        energy = 2.0 * columns * weights
        if self.rounding == "rtn":
            return energy * (1 + count) + _ROUNDING_OPERATIONS * count * weights
        levels, refits = [count] * len(layers), 1 + offsets / count
        sweeps = sweep_operations(layers, levels, factorizes=True, passes=self.passes, refits=refits)
        return sweeps + _FIT_OPERATIONS * count * weights

    def _sweep_bytes(self, kinds: int, columns: int) -> int:
        """Bytes that a sweep takes for each row."""
        per_code = _BYTES_PER_CODE + (_BYTES_OF_PASSES if self.passes else 0)
        return (per_code * kinds + _BYTES_PER_WEIGHT) * columns
