"""Variants of the sparsity family: the levels of each layer, the method that prunes, and the packed result."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from evopress.compression.pruned import Pruned
from evopress.compression.score_pruning import magnitude, wanda
from evopress.compression.settings import SparseGptSettings, SparsitySettings, WandaSettings
from evopress.compression.sparse_packing import BITMASK, encode_bitmask
from evopress.compression.sparsegpt import inverse_factor, sparsegpt
from evopress.compression.sparsity_levels import SparsityLevel, pattern_levels, unstructured_levels
from evopress.compression.variant import Variant
from evopress.util.errors import CompressionError
from evopress.util.progress import log

_BYTES_PER_WEIGHT = 16
"""Peak memory of a sweep per level and weight: the float32 panel, weights and mask in both layouts."""

Prune = Callable[[Tensor, Sequence[SparsityLevel]], Pruned]
"""(weights [layers, rows, columns], levels) -> all levels of all layers."""


def sparse_variants(
    weights: Mapping[str, Tensor], hessian: Tensor, settings: SparsitySettings, memory: float
) -> list[Variant]:
    """Make all sparse variants of layers that share their input, those of equal shape in one sweep.

    Args:
        weights: finite weights [rows, columns] by layer, all with the same columns.
        hessian: X^T X of their input, [columns, columns].
        settings: the method and its levels.
        memory: bytes that a sweep may take; layers, then levels are split into several sweeps where they need more.

    Raises:
        CompressionError: the layers cannot be pruned as asked.
    """
    prune, damping = _method(settings, hessian)
    by_layer: dict[str, list[Variant]] = {layer: [] for layer in weights}
    for layers in _of_same_shape(weights, memory):
        stacked = torch.stack([weights[layer] for layer in layers])
        levels = _levels(layers, stacked, settings)
        energies = torch.einsum("lrc,lrc->l", stacked.float() @ hessian, stacked.float()).double()
        for batch in _batches(levels, stacked.numel(), memory):
            pruned = prune(stacked, batch)
            for number, layer in enumerate(layers):
                by_layer[layer] += _packed(layer, number, batch, pruned, float(energies[number]), damping)
    return [variant for variants in by_layer.values() for variant in variants]


def _method(settings: SparsitySettings, hessian: Tensor) -> tuple[Prune, float]:
    """The function that prunes, and the damping that it uses (0 where the method has none)."""
    if isinstance(settings, SparseGptSettings):
        factor, options = inverse_factor(hessian, settings.damping), (settings.block_size, settings.even_blocks)
        return lambda weights, levels: sparsegpt(weights, factor, levels, *options), factor.damping
    score = wanda if isinstance(settings, WandaSettings) else magnitude
    return lambda weights, levels: score(weights, hessian, levels), 0.0


def _of_same_shape(weights: Mapping[str, Tensor], memory: float) -> Iterator[list[str]]:
    """Names of layers of the same shape and type, as many together as the memory holds one level of."""
    by_kind: dict[object, list[str]] = {}
    for layer, weight in weights.items():
        by_kind.setdefault((weight.shape, weight.dtype), []).append(layer)
    for layers in by_kind.values():
        most = _share_of(memory, weights[layers[0]].numel(), len(layers))
        yield from (layers[start : start + most] for start in range(0, len(layers), most))


def _share_of(memory: float, weights: int, count: int) -> int:
    """How many of ``count`` times so many weights a sweep may hold: at least one."""
    return int(max(1.0, min(count, memory / (_BYTES_PER_WEIGHT * weights))))


def _levels(layers: Sequence[str], stacked: Tensor, settings: SparsitySettings) -> list[SparsityLevel]:
    """Levels of layers of the same shape, stacked as [layers, rows, columns]."""
    parameters, columns = stacked[0].numel(), stacked.shape[-1]
    try:
        if settings.patterns:
            return pattern_levels(parameters, columns, settings.patterns)
        levels = unstructured_levels(parameters, settings.sparsity, settings.step, settings.levels)
    except CompressionError as error:
        raise CompressionError(f"{', '.join(layers)}: {error}") from error
    if len(levels) == 1 and settings.levels:
        log.info(
            "%s: %d weights leave no room for a step of %d; fixed at sparsity %g",
            ", ".join(layers),
            parameters,
            settings.step,
            settings.sparsity,
        )
    return levels


def _batches(levels: Sequence[SparsityLevel], weights: int, memory: float) -> Iterator[list[SparsityLevel]]:
    """Levels that one sweep makes: those without a pattern or of the same m, as many as the memory allows."""
    most = _share_of(memory, weights, len(levels))
    widths = dict.fromkeys(level.pattern and level.pattern[1] for level in levels)
    for width in widths:
        alike = [level for level in levels if (level.pattern and level.pattern[1]) == width]
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def _packed(
    layer: str, number: int, levels: Sequence[SparsityLevel], pruned: Pruned, energy: float, damping: float
) -> Iterator[Variant]:
    """Variants of the layer at ``number`` in the stack."""
    for index, level in enumerate(levels):
        weight, kept = pruned.weights[index, number], pruned.kept[index, number]
        yield Variant(
            layer=layer,
            level=level.label,
            value=level.removed / weight.numel(),
            cost=weight.numel() - level.removed,
            parameters=weight.numel(),
            format=BITMASK,
            parts=encode_bitmask(weight, kept),
            error=float(pruned.errors[index, number]) / energy if energy > 0 else 0.0,
            damping=damping,
        )
