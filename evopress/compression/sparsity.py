"""The levels of methods that prune, and what these methods share.

A layer is offered exact numbers of weights to remove, so that layers of different size trade: as in EvoPress (arXiv
2410.14649, section 4.2), neighbouring levels of every layer differ by the same number of weights. Level 0 is the target
sparsity; "+3" removes three steps more, "-3" three steps fewer. Layers of equal shape are pruned together, to as many
levels at once as the memory allows.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from evopress.compression.base import Format, LayerMethod, Level, Variant
from evopress.compression.families import SPARSITY
from evopress.compression.layers import LayerShape, sweep_bytes, sweep_operations
from evopress.util.errors import CompressionError
from evopress.util.progress import log

if TYPE_CHECKING:
    from torch import Tensor

    Prune = Callable[[Tensor, Sequence["SparsityLevel"]], "Pruned"]
    """(weights [layers, rows, columns], levels) -> all levels of all layers."""


@dataclass(frozen=True)
class SparsityLevel:
    """How many weights of a layer go, and which structure they keep to."""

    label: str
    """Signed steps from the target, or the pattern."""
    removed: int
    """Weights of the layer that become zero."""
    pattern: tuple[int, int] | None = None
    """n of every m neighbouring inputs are kept; None is anywhere in the layer."""


@dataclass(frozen=True)
class Rounded:
    """The weights that are kept as integers: (code - zero) x scale; those that go have the zero point as their code."""

    bits: int
    codes: "Tensor"
    """uint8 [levels, layers, rows, columns]."""
    scales: "Tensor"
    """In the type that stores them, [levels, layers, rows, groups]."""
    zeros: "Tensor"
    """uint8 [levels, layers, rows, groups]."""
    exponents: tuple[int, ...] = ()
    """Of the powers of two by which each layer was multiplied to have such scales; empty where none was."""

    def packed(self, level: int, layer: int, kept: "Tensor") -> "tuple[Format, dict[str, Tensor]]":
        """Format and parts of a layer at a level, of which the weights ``kept`` (bool [rows, columns]) are left."""
        from evopress.compression.formats.sparse_integer import SparseIntegerFormat

        scales = self.scales[level, layer]
        form = SparseIntegerFormat(self.bits, kept.shape[1] // scales.shape[1])
        if self.exponents and self.exponents[layer]:
            scales = scales.float() * 2.0 ** -self.exponents[layer]
        return form, form.encode(self.codes[level, layer], kept, scales, self.zeros[level, layer])


@dataclass(frozen=True)
class Pruned:
    """Some levels of some layers of the same shape."""

    weights: "Tensor"
    """With zeros, in the type of the given weights, [levels, layers, rows, columns]."""
    kept: "Tensor"
    """Which weights are kept (and may still be zero), bool [levels, layers, rows, columns]."""
    errors: "Tensor"
    """tr(dW H dW^T), with the Hessian as given (no damping), float64 [levels, layers]."""
    rounded: Rounded | None = None
    """Where the weights that are kept are rounded."""

    def packed(self, level: int, layer: int) -> "tuple[Format, dict[str, Tensor]]":
        """Format and parts of a layer at a level."""
        from evopress.compression.formats.bitmask import BitmaskFormat

        kept = self.kept[level, layer]
        if self.rounded is not None:
            return self.rounded.packed(level, layer, kept)
        form = BitmaskFormat()
        return form, form.encode(self.weights[level, layer], kept)


def unstructured_levels(parameters: int, target: float, step: int, each_way: int) -> list[SparsityLevel]:
    """Levels from the densest to the sparsest; at least one weight of the layer stays, at least none goes.

    Level 0 removes the least number of weights that reaches the target, so a model at level 0 everywhere never exceeds
    its budget. A layer without room for a step either way has level 0 alone.

    Args:
        parameters: weights of the layer.
        target: sparsity of level 0, strictly between 0 and 1.
        step: weights between two levels.
        each_way: levels on either side of the target, at most.

    Raises:
        CompressionError: not even level 0 leaves the layer a weight.
    """
    centre = removed_at(parameters, target)
    if centre >= parameters:
        raise CompressionError(
            f"sparsity {target} leaves nothing of a layer of {parameters} weights; lower it or exclude the layer"
        )
    counts = {steps: centre + steps * step for steps in range(-each_way, each_way + 1)}
    return [SparsityLevel(step_label(steps), removed) for steps, removed in counts.items() if 0 <= removed < parameters]


def removed_at(parameters: int, sparsity: float) -> int:
    """The exact least number of weights whose removal reaches ``sparsity``, taken as it is written in decimal."""
    return math.ceil(Fraction(str(sparsity)) * parameters)


def pattern_levels(parameters: int, columns: int, patterns: Sequence[str]) -> list[SparsityLevel]:
    """One level per n:m pattern, from the densest to the sparsest.

    Raises:
        CompressionError: a pattern does not divide the layer's inputs.
    """
    levels = []
    for pattern in patterns:
        keep, of = parse_pattern(pattern)
        if columns % of:
            raise CompressionError(
                f"pattern {pattern} needs inputs in multiples of {of}, but there are {columns}; exclude the layer"
            )
        levels.append(SparsityLevel(pattern, parameters // of * (of - keep), (keep, of)))
    return sorted(levels, key=lambda level: level.removed)


def portions(total: int, parts: Sequence[int]) -> list[int]:
    """Cut ``total`` into whole shares that sum to it, each less than 1 away from being proportional to its part."""
    return list(_portions(total, parts))


def _portions(total: int, parts: Sequence[int]) -> Iterator[int]:
    whole, before, given = sum(parts), 0, 0
    for part in parts:
        before += part
        reached = total * before // whole
        yield reached - given
        given = reached


def parse_pattern(text: str) -> tuple[int, int]:
    """Read ``n:m``: n of every m neighbouring inputs are kept.

    Raises:
        ValueError: it is no such pattern, or it keeps everything.
    """
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"{text!r} is not a pattern n:m with 0 < n < m, as in 2:4 (two of every four weights are kept)"
        )
    return int(match[1]), int(match[2])


def pattern_sparsity(text: str) -> float:
    """Share of the weights that the pattern ``n:m`` removes."""
    kept, of = parse_pattern(text)
    return (of - kept) / of


def step_label(steps: int) -> str:
    """Label of the level that lies ``steps`` steps beyond the target sparsity, as in `+3`."""
    return f"{steps:+d}" if steps else "0"


class PruningMethod(LayerMethod):
    """Which weights may go; the levels are the same whatever method chooses them."""

    family = SPARSITY
    factorizes: ClassVar[bool] = False
    """Whether the method takes a Cholesky factor of the Hessian."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="Level 0: the share of each layer's weights that become zero.")
    step: int = Field(1_000_000, ge=1, description="Weights between two levels, the same for layers of every size.")
    levels: int = Field(8, ge=0, description="Levels on either side of level 0, where a layer has room for them.")
    patterns: tuple[str, ...] = Field(
        (),
        description="Patterns `n:m` (n of every m neighbouring weights are kept), one level each, in place of "
        "`sparsity`, `step` and `levels`, which put zeros anywhere.",
    )

    _only: frozenset[str] | None = PrivateAttr(None)
    """Labels of the levels that are made; None is all."""

    @model_validator(mode="before")
    @classmethod
    def _only_some_round(cls, values: Any) -> Any:
        if isinstance(values, dict) and "bits" in values and "bits" not in cls.model_fields:
            raise ValueError("bits: weights that are kept stay as they are; `method: sparsegpt` rounds them as well")
        return values

    @field_validator("patterns")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            parse_pattern(pattern)
        if len(set(patterns)) != len(patterns):
            raise ValueError(f"a pattern is named twice in {list(patterns)}")
        return patterns

    @property
    def bytes_per_weight(self) -> int:
        """Peak memory of a sweep per level and weight: the float32 panel, weights and mask in both layouts, ..."""
        return 22

    @property
    def further_passes(self) -> int:
        """Over the columns, after the first."""
        return 0

    def labels(self) -> list[str]:
        """Patterns, or steps from the target."""
        return list(self.patterns) or [step_label(steps) for steps in range(-self.levels, self.levels + 1)]

    def limited(self, labels: Collection[str]) -> Self:
        """Other sparsities or patterns are left out."""
        copy = self.model_copy()
        copy._only = frozenset(labels)
        return copy

    def target_problems(self, target: float, where: str) -> Iterator[str]:
        """A target that is no sparsity, or above all patterns."""
        if target >= 1:
            yield f"{where}.target: {target:g} is no sparsity below 1, which is what these variants offer"
        elif self.patterns and target > (highest := max(map(pattern_sparsity, self.patterns))):
            yield f"{where}.target: {target:g} sparsity is above the highest level ({highest:g})"

    def levels_of(self, layer: LayerShape) -> list[Level]:
        """Levels from the densest to the sparsest."""
        levels, parameters = self.sparsities(layer.parameters, layer.columns), layer.parameters
        return [
            Level(
                level.label,
                level.removed / parameters,
                parameters - level.removed,
                self.packed_bytes(layer, parameters - level.removed),
            )
            for level in levels
        ]

    def packed_bytes(self, layer: LayerShape, kept: int) -> int:
        """Exact size of a layer of which ``kept`` weights are left."""
        from evopress.compression.formats.bitmask import BitmaskFormat

        return BitmaskFormat().bytes(layer.parameters, kept, layer.itemsize)

    def check_inputs(self, columns: int, everywhere: Collection[int]) -> None:
        """Refuse patterns that do not divide the inputs."""
        pattern_levels(columns, columns, self.patterns)

    def sparsities(self, parameters: int, columns: int) -> list["SparsityLevel"]:
        """Levels of a layer of so many weights and inputs, from the densest to the sparsest.

        Raises:
            CompressionError: the layer cannot have them.
        """
        if self.patterns:
            levels = pattern_levels(parameters, columns, self.patterns)
        else:
            levels = unstructured_levels(parameters, self.sparsity, self.step, self.levels)
        return [level for level in levels if self._only is None or level.label in self._only]

    def pruner(self, hessian: "Tensor") -> "tuple[Prune, float]":
        """The function that prunes layers with this Hessian, and the damping that it uses (0 where it has none).

        Raises:
            CompressionError: the Hessian cannot be factorized.
        """
        raise NotImplementedError

    def compress(self, weights: "Mapping[str, Tensor]", hessian: "Tensor", memory: float = math.inf) -> list[Variant]:
        """All variants of layers that share their input, those of equal shape in one sweep.

        Layers, then levels are split into several sweeps where one would take more than ``memory``.
        """
        import torch

        prune, damping = self.pruner(hessian)
        by_layer: dict[str, list[Variant]] = {layer: [] for layer in weights}
        for layers in of_same_shape(weights, memory, self.bytes_per_weight):
            stacked = torch.stack([weights[layer] for layer in layers])
            levels = self._levels_of_all(layers, stacked)
            energies = torch.einsum("lrc,lrc->l", stacked.float() @ hessian, stacked.float()).double()
            for batch in _batches(levels, self.bytes_per_weight * stacked.numel(), memory):
                pruned = prune(stacked, batch)
                for number, layer in enumerate(layers):
                    by_layer[layer] += _packed(layer, number, batch, pruned, float(energies[number]), damping)
        return [variant for variants in by_layer.values() for variant in variants]

    def _levels_of_all(self, layers: Sequence[str], stacked: "Tensor") -> list["SparsityLevel"]:
        """Levels of layers of the same shape, stacked as [layers, rows, columns]."""
        parameters, columns = stacked[0].numel(), stacked.shape[-1]
        levels, names = self.sparsities(parameters, columns), ", ".join(layers)
        if len(levels) == 1 and self.levels and not self.patterns and self._only is None:
            log.info(
                "%s: %d weights leave no room for a step of %d; fixed at sparsity %g",
                names,
                parameters,
                self.step,
                self.sparsity,
            )
        return levels

    def peak_bytes(self, layers: Sequence[LayerShape], memory: float) -> int:
        """With a panel of one level of a layer at least."""
        panel = self.bytes_per_weight * sum(len(self.levels_of(layer)) * layer.parameters for layer in layers)
        least = self.bytes_per_weight * max(layer.parameters for layer in layers)
        sweep = min(panel, max(memory, least))
        return sweep_bytes(layers, sweep, factorizes=self.factorizes, passes=self.further_passes)

    def operations(self, layers: Sequence[LayerShape]) -> float:
        """Of the relative errors, and of the sweep where the method makes one."""
        levels = [len(self.levels_of(layer)) for layer in layers]
        return sweep_operations(layers, levels, factorizes=self.factorizes, passes=self.further_passes)


def of_same_shape(weights: "Mapping[str, Tensor]", memory: float, bytes_per_weight: int) -> Iterator[list[str]]:
    """Names of layers of the same shape and type, as many together as the memory holds one level of."""
    by_kind: dict[object, list[str]] = {}
    for layer, weight in weights.items():
        by_kind.setdefault((weight.shape, weight.dtype), []).append(layer)
    for layers in by_kind.values():
        most = _share_of(memory, bytes_per_weight * weights[layers[0]].numel(), len(layers))
        yield from (layers[start : start + most] for start in range(0, len(layers), most))


def _share_of(memory: float, size: int, count: int) -> int:
    """How many of ``count`` things of ``size`` bytes each a sweep may hold: at least one."""
    return int(max(1.0, min(count, memory / size)))


def _batches(levels: Sequence[SparsityLevel], size: int, memory: float) -> Iterator[list[SparsityLevel]]:
    """Levels that one sweep makes, ``size`` bytes each: those without a pattern or of the same m, as many as fit."""
    most = _share_of(memory, size, len(levels))
    widths = dict.fromkeys(level.pattern and level.pattern[1] for level in levels)
    for width in widths:
        alike = [level for level in levels if (level.pattern and level.pattern[1]) == width]
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def _packed(
    layer: str, number: int, levels: Sequence[SparsityLevel], pruned: Pruned, energy: float, damping: float
) -> Iterator[Variant]:
    """Variants of the layer at ``number`` in the stack."""
    parameters = pruned.weights[0, number].numel()
    for index, level in enumerate(levels):
        form, parts = pruned.packed(index, number)
        yield Variant(
            layer=layer,
            level=level.label,
            value=level.removed / parameters,
            cost=parameters - level.removed,
            parameters=parameters,
            format=str(form),
            parts=parts,
            error=float(pruned.errors[index, number]) / energy if energy > 0 else 0.0,
            damping=damping,
        )
