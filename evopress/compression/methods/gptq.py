"""GPTQ: quantization at several bit-widths, with the errors of each column made up for in those after it."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator

from evopress.compression.base import INTEGERS, PASSES, LayerMethod, Level, Variant
from evopress.compression.families import BITS
from evopress.compression.layers import LayerShape, check_group_size, sweep_bytes, sweep_operations
from evopress.util.progress import log

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.compression.gptq import Quantized

_BYTES_PER_CODE = 14
"""Peak memory of a sweep per level and weight: the float32 panel, a temporary of its size, codes and their copies."""
_BYTES_OF_PASSES = 12
"""More than that, with further passes: two more panels, and what a matrix product takes ..."""
_BYTES_OF_CHANNELS = 12
"""... and where they fit scales of whole rows: as much again."""


class Gptq(LayerMethod):
    """GPTQ (arXiv 2210.17323) at several bit-widths."""

    family = BITS
    formats = INTEGERS
    method: Literal["gptq"] = "gptq"
    bits: tuple[int, ...] = Field((2, 3, 4, 5, 6), min_length=1, description="Bit-widths to offer, from 2 to 8.")
    group_size: int | None = Field(64, ge=1, description="Inputs that share a scale; null is one scale per channel.")
    symmetric: bool = Field(False, description="Grid symmetric about zero, without a zero point.")
    scale_dtype: Literal["float16", "bfloat16"] = Field(
        "float16",
        description="Type that stores the scales. A runtime that holds them in the type of the model (`exports: "
        "[compressed_tensors]`) needs `bfloat16` for a model of that type.",
    )
    embedding: bool = Field(
        False,
        description="Whether the input embedding and the head have levels as well; one that is tied to the other is "
        "one unit. They are rounded to nearest, with the head's inputs as importance.",
    )
    activation_order: bool = Field(True, description="Quantize columns by decreasing Hessian diagonal.")
    clip_search: bool = Field(True, description="Clip each group's range where that rounds with less error.")
    damping: float = Field(0.01, gt=0, lt=1, description="Share of the mean Hessian diagonal added to the diagonal.")
    block_size: int = Field(128, ge=1, description="Columns between two lazy updates of the remaining ones.")
    passes: int = Field(
        PASSES,
        ge=0,
        description="Further passes over the columns, each of which fits the scales anew and rounds every column "
        "again, given all others, so that the layer's error falls (coordinate descent, as in QuantEase); 0 is GPTQ as "
        "published.",
    )

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= b <= 8 for b in bits):
            raise ValueError(f"bit-widths must lie between 2 and 8, got {list(bits)}")
        if len(set(bits)) != len(bits):
            raise ValueError(f"a bit-width is named twice in {list(bits)}")
        return tuple(sorted(bits))

    def labels(self) -> list[str]:
        """Bit-widths."""
        return [str(bits) for bits in self.bits]

    def limited(self, labels: Collection[str]) -> Self:
        """Those of its bit-widths."""
        return self.model_copy(update={"bits": tuple(bits for bits in self.bits if str(bits) in labels)})

    def for_embedding(self) -> Self:
        """Without further passes, which have little to gain there."""
        return self.model_copy(update={"passes": 0})

    def target_problems(self, target: float, where: str) -> Iterator[str]:
        """A target below the lowest bit-width, or above the highest."""
        if target < min(self.bits):
            yield f"{where}.target: {target:g} bits is below the lowest level ({min(self.bits)})"
        elif target > max(self.bits):
            yield f"{where}.target: {target:g} bits is above the highest level ({max(self.bits)})"

    def levels_of(self, layer: LayerShape) -> list[Level]:
        """Codes of each bit-width, with their scales and zero points."""
        from evopress.compression.formats.integer import IntegerFormat

        group = check_group_size(self.group_size, layer.columns)
        return [
            Level(
                str(bits),
                float(bits),
                bits * layer.parameters,
                IntegerFormat(bits, group, self.symmetric).bytes(layer.rows, layer.columns),
            )
            for bits in self.bits
        ]

    def check_inputs(self, columns: int, everywhere: Collection[int]) -> None:
        """Refuse a group size that does not divide the inputs; what the error offers divides those of all layers."""
        check_group_size(self.group_size, columns, everywhere)

    def compress(self, weights: "Mapping[str, Tensor]", hessian: "Tensor", memory: float = math.inf) -> list[Variant]:
        """Quantize the layers, stacked by rows, in one sweep for all bit-widths."""
        import torch

        from evopress.compression.gptq import gptq

        stacked = torch.cat(list(weights.values())).float()
        rows, columns = stacked.shape
        exponents = self._to_usual_units(weights, stacked, hessian)
        quantized = gptq(
            stacked,
            hessian,
            self.bits,
            self.group_size,
            self.symmetric,
            self.activation_order,
            self.damping,
            self.block_size,
            self.clip_search,
            rows_at_once=int(min(rows, max(1.0, memory / (self._bytes_per_weight * columns)))),
            scale_dtype=getattr(torch, self.scale_dtype),
            passes=self.passes,
        )
        energies = torch.einsum("rc,rc->r", stacked @ hessian, stacked).double()
        return list(self._packed(weights, quantized, energies, exponents))

    def _to_usual_units(self, weights: "Mapping[str, Tensor]", stacked: "Tensor", hessian: "Tensor") -> dict[str, int]:
        """Multiply each layer's rows of ``stacked`` by a power of two where float16 would not hold its scales.

        Relative errors stay what they are.

        Returns:
            The exponent by layer; 0 for the usual ones, which are left alone.
        """
        from evopress.compression.grid import scale_exponent

        if self.scale_dtype == "bfloat16":  # has the range of float32
            return dict.fromkeys(weights, 0)
        group = check_group_size(self.group_size, stacked.shape[1])
        exponents = {}
        for layer, rows in zip(weights, stacked.split([len(weight) for weight in weights.values()]), strict=True):
            exponents[layer] = scale_exponent(rows, hessian.diagonal(), self.bits, group)
            if exponents[layer]:
                rows.mul_(2.0 ** exponents[layer])
                log.info("%s: weights outside of what float16 scales hold; its scales are float32", layer)
        return exponents

    def _packed(
        self,
        weights: "Mapping[str, Tensor]",
        quantized: "Quantized",
        energies: "Tensor",
        exponents: Mapping[str, int],
    ) -> Iterator[Variant]:
        """Variants of layers that were quantized together.

        Args:
            weights: by layer.
            quantized: the layers, stacked by rows.
            energies: what errors are relative to, [rows].
            exponents: of the powers of two by which the layers were multiplied.
        """
        from evopress.compression.formats.integer import IntegerFormat

        start = 0
        for layer, weight in weights.items():
            own = slice(start, start + len(weight))
            start = own.stop
            energy = float(energies[own].sum())
            for index, bits in enumerate(self.bits):
                form = IntegerFormat(bits, self.group_size or weight.shape[1], self.symmetric)
                scales = quantized.scales[index, own]
                if exponents[layer]:
                    scales = scales.float() * 2.0 ** -exponents[layer]
                parts = form.encode(quantized.codes[index, own], scales, quantized.zeros[index, own])
                yield Variant(
                    layer=layer,
                    level=str(bits),
                    value=float(bits),
                    cost=bits * weight.numel(),
                    parameters=weight.numel(),
                    format=str(form),
                    parts={name: tensor.cpu() for name, tensor in parts.items()},
                    error=float(quantized.errors[index, own].sum()) / energy if energy > 0 else 0.0,
                    damping=quantized.damping,
                )

    def peak_bytes(self, layers: Sequence[LayerShape], memory: float) -> int:
        """With a panel of all levels of one row at least."""
        least = self._bytes_per_weight * layers[0].columns
        panel = self._bytes_per_weight * sum(layer.parameters for layer in layers)
        return sweep_bytes(layers, min(panel, max(memory, least)), factorizes=True, passes=self.passes)

    def operations(self, layers: Sequence[LayerShape]) -> float:
        """Of the factor, the sweep and the relative errors."""
        levels = [len(self.bits)] * len(layers)
        return sweep_operations(layers, levels, factorizes=True, passes=self.passes, refits=1)

    @property
    def _bytes_per_weight(self) -> int:
        """What a sweep takes for each weight, at all bit-widths."""
        further = _BYTES_OF_PASSES + (_BYTES_OF_CHANNELS if self.group_size is None else 0)
        return (_BYTES_PER_CODE + (further if self.passes else 0)) * len(self.bits)
