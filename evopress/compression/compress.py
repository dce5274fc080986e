"""Compression methods: each turns layers that share an input into variants, whatever the method calls a level."""

from collections.abc import Mapping

import torch
from torch import Tensor

from evopress.compression.gptq import gptq
from evopress.compression.grid import scale_exponent
from evopress.compression.packing import IntegerFormat
from evopress.compression.settings import CompressionSettings, GptqSettings
from evopress.compression.sparsity import sparse_variants
from evopress.compression.variant import Variant
from evopress.config.group_size import check_group_size
from evopress.util.progress import log

_BYTES_PER_CODE = 12
"""Peak memory of a sweep per level and weight: the float32 panel, a temporary of its size, codes and their copies."""


def compress(
    weights: Mapping[str, Tensor], hessian: Tensor, settings: CompressionSettings, memory: float = float("inf")
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
    if isinstance(settings, GptqSettings):
        return _gptq_variants(weights, hessian, settings, memory)
    return sparse_variants(weights, hessian, settings, memory)


def _gptq_variants(
    weights: Mapping[str, Tensor], hessian: Tensor, settings: GptqSettings, memory: float
) -> list[Variant]:
    """Quantize the layers, stacked by rows, in one sweep for all bit-widths."""
    stacked = torch.cat(list(weights.values())).float()
    rows, columns = stacked.shape
    exponents = _to_usual_units(weights, stacked, hessian, settings)
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
            scales = quantized.scales[index, own]
            if exponents[layer]:
                scales = scales.float() * 2.0 ** -exponents[layer]
            parts = form.encode(quantized.codes[index, own], scales, quantized.zeros[index, own])
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


def _to_usual_units(
    weights: Mapping[str, Tensor], stacked: Tensor, hessian: Tensor, settings: GptqSettings
) -> dict[str, int]:
    """Multiply each layer's rows of ``stacked`` by a power of two where float16 would not hold its scales.

    Relative errors stay what they are.

    Returns:
        The exponent by layer; 0 for the usual ones, which are left alone.
    """
    group = check_group_size(settings.group_size, stacked.shape[1])
    exponents = {}
    for layer, rows in zip(weights, stacked.split([len(weight) for weight in weights.values()]), strict=True):
        exponents[layer] = scale_exponent(rows, hessian.diagonal(), settings.bits, group)
        if exponents[layer]:
            rows.mul_(2.0 ** exponents[layer])
            log.info("%s: weights outside of what float16 scales hold; its scales are float32", layer)
    return exponents
