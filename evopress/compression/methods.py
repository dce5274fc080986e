"""Compression methods: each turns layers that share an input into variants, whatever the method calls a level."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evopress.compression.gptq import gptq
from evopress.compression.packing import IntegerFormat, stored_bytes
from evopress.config.variants import GptqSettings, VariantSettings

_BYTES_PER_CODE = 12
"""Peak memory of a sweep per level and weight: the float32 panel, a temporary of its size, codes and their copies."""


@dataclass(frozen=True)
class Variant:
    """One layer at one level, packed."""

    layer: str
    level: str
    """Label, as in tables and names of tensors."""
    value: float
    """Bits, or sparsity."""
    cost: int
    """What a budget counts."""
    parameters: int
    """Weights of the layer."""
    format: str
    """How the parts decode (`packing.decode`)."""
    parts: dict[str, Tensor]
    error: float
    """Relative output error tr(dW H dW^T) / tr(W H W^T)."""
    damping: float

    @property
    def bytes(self) -> int:
        """Exact size of the parts."""
        return stored_bytes(self.parts)


def compress(
    weights: Mapping[str, Tensor], hessian: Tensor, settings: VariantSettings, memory: float = float("inf")
) -> list[Variant]:
    """Make all variants of layers that share their input, by the method that the settings name.

    Args:
        weights: finite weights [rows, columns] by layer, all with the same columns.
        hessian: X^T X of their input, [columns, columns], on the device that does the work.
        settings: the method and its levels.
        memory: bytes that the sweep may take beside weights and Hessian.

    Raises:
        CompressionError: the layers cannot be compressed as asked.
    """
    return _gptq_variants(weights, hessian, settings, memory)


def _gptq_variants(
    weights: Mapping[str, Tensor], hessian: Tensor, settings: GptqSettings, memory: float
) -> list[Variant]:
    """Quantize the layers, stacked by rows, in one sweep for all bit-widths."""
    stacked = torch.cat(list(weights.values())).float()
    rows, columns = stacked.shape
    quantized = gptq(
        stacked,
        hessian,
        settings.bits,
        settings.group_size,
        settings.symmetric,
        settings.activation_order,
        settings.damping,
        settings.block_size,
        settings.clip_search,
        rows_at_once=int(min(rows, max(1.0, memory / (_BYTES_PER_CODE * len(settings.bits) * columns)))),
    )
    energies = torch.einsum("rc,rc->r", stacked @ hessian, stacked).double()
    variants, start = [], 0
    for layer, weight in weights.items():
        own = slice(start, start + len(weight))
        start = own.stop
        energy = float(energies[own].sum())
        for index, bits in enumerate(settings.bits):
            form = IntegerFormat(bits, settings.group_size or columns, settings.symmetric)
            parts = form.encode(quantized.codes[index, own], quantized.scales[index, own], quantized.zeros[index, own])
            variants.append(
                Variant(
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
            )
    return variants
