"""Pruning methods: magnitude, Wanda and SparseGPT."""

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from evopress.compression.base import PASSES
from evopress.compression.families import ROUNDED_SPARSITY, SPARSITY, Sparsity
from evopress.compression.layers import LayerShape, check_group_size
from evopress.compression.sparsity import PruningMethod, parse_pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from evopress.compression.descent import Descent
    from evopress.compression.sparsegpt import InverseFactor
    from evopress.compression.sparsity import Prune, Pruned, SparsityLevel


# Pruning by magnitude: the baseline that looks at nothing but the weights.


class Magnitude(PruningMethod):
    """In each layer, the least weights go."""

    method: Literal["magnitude"] = "magnitude"

    def pruner(self, hessian: "Tensor") -> "tuple[Prune, float]":
        """The Hessian only tells the errors."""
        from evopress.compression.pruning import magnitude

        return lambda weights, levels: magnitude(weights, hessian, levels), 0.0


# Wanda: pruning by the size of weights and of their inputs.


class Wanda(PruningMethod):
    """Wanda (arXiv 2306.11695): in each output row, the least weights times the norm of their inputs go."""

    method: Literal["wanda"] = "wanda"

    def pruner(self, hessian: "Tensor") -> "tuple[Prune, float]":
        """The scores need the norms of the inputs alone."""
        from evopress.compression.pruning import wanda

        return lambda weights, levels: wanda(weights, hessian, levels), 0.0


# SparseGPT: pruning in which the weights that are kept make up for those that go.


class SparseGpt(PruningMethod):
    """SparseGPT (arXiv 2301.00774): weights that are kept make up for those that go."""

    factorizes = True
    gains_by_polish = True
    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, lt=1, description="Share of the mean Hessian diagonal added to the diagonal.")
    block_size: int = Field(128, ge=1, description="Columns among which a mask is chosen and errors are made up for.")
    even_blocks: bool = Field(
        False, description="Take as much from every block of columns, as the paper does, and not where it costs least."
    )
    bits: int | None = Field(
        None,
        ge=2,
        le=8,
        description="Round the weights that are kept to so many bits, from 2 to 8, in the same sweep; null keeps them "
        "in the type of the model.",
    )
    group_size: int | None = Field(
        64, ge=1, description="With `bits`, inputs that share a scale; null is one scale per channel."
    )
    passes: int = Field(
        PASSES,
        ge=0,
        description="Further passes over the columns, each of which makes what is kept of every column anew, given all "
        "others, so that the layer's error falls (coordinate descent); 0 is SparseGPT as published.",
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.bits is None and "group_size" in self.model_fields_set:
            raise ValueError("group_size: weights that are not rounded share no scale; set `bits` as well")
        if self.bits is None or self.group_size is None:
            return self
        for pattern in self.patterns:
            if self.group_size % (of := parse_pattern(pattern)[1]):
                raise ValueError(f"group_size: {self.group_size} is no multiple of the {of} of the pattern {pattern}")
        return self

    @model_serializer(mode="wrap")
    def _as_they_matter(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `bits`, nothing depends on how weights would be rounded."""
        values: dict[str, Any] = dump(self)
        return {key: values[key] for key in values if self.bits is not None or key not in ("bits", "group_size")}

    @property
    def family(self) -> Sparsity:  # type: ignore[override]
        """One for each bit-width of what is kept, and one for weights as they are."""
        return SPARSITY if self.bits is None else ROUNDED_SPARSITY[self.bits]

    @property
    def bytes_per_weight(self) -> int:
        """With codes in both layouts, what is fitted of a group as wide as the layer, and what passes take."""
        return super().bytes_per_weight + (0 if self.bits is None else 8) + (8 if self.passes else 0)

    @property
    def further_passes(self) -> int:
        """As the settings say."""
        return self.passes

    def packed_bytes(self, layer: LayerShape, kept: int) -> int:
        """With `bits`, of the mask, of so many integers, and of their scales and zero points."""
        from evopress.compression.formats.sparse_integer import SparseIntegerFormat

        if self.bits is None:
            return super().packed_bytes(layer, kept)
        group = check_group_size(self.group_size, layer.columns)
        return SparseIntegerFormat(self.bits, group).bytes(layer.rows, layer.columns, kept)

    def check_inputs(self, columns: int, everywhere: Collection[int]) -> None:
        """Refuse a group size that does not divide the inputs, too; the error offers what divides those of all."""
        super().check_inputs(columns, everywhere)
        if self.bits is not None:
            check_group_size(self.group_size, columns, everywhere)

    def pruner(self, hessian: "Tensor") -> "tuple[Prune, float]":
        """A sweep with the inverse factor of the damped Hessian."""
        from evopress.compression.descent import Descent
        from evopress.compression.sparsegpt import inverse_factor, sparsegpt

        factor = inverse_factor(hessian, self.damping)
        descent = Descent(hessian, factor.shift) if self.passes else None
        options = self.block_size, self.even_blocks, None, descent, self.passes
        if self.bits is None:
            return lambda weights, levels: sparsegpt(weights, factor, levels, *options), factor.damping
        diagonal = hessian.diagonal()
        return lambda weights, levels: self._rounded(weights, levels, factor, descent, diagonal), factor.damping

    def _rounded(
        self,
        weights: "Tensor",
        levels: "Sequence[SparsityLevel]",
        factor: "InverseFactor",
        descent: "Descent | None",
        diagonal: "Tensor",
    ) -> "Pruned":
        """Prune and round layers [layers, rows, columns], some times a power of two so that float16 holds the scales.

        Relative errors stay what they are.
        """
        import torch

        from evopress.compression.grid import scale_exponent
        from evopress.compression.sparsegpt import Rounding, sparsegpt

        assert self.bits is not None
        group = check_group_size(self.group_size, weights.shape[-1])
        exponents = tuple(scale_exponent(layer.float(), diagonal, [self.bits], group) for layer in weights)
        options = self.block_size, self.even_blocks, Rounding(self.bits, group), descent, self.passes
        if not any(exponents):
            return sparsegpt(weights, factor, levels, *options)
        factors = torch.tensor([2.0**exponent for exponent in exponents], device=weights.device)[:, None, None]
        pruned = sparsegpt(weights.float() * factors, factor, levels, *options)
        assert pruned.rounded is not None
        return replace(
            pruned,
            weights=(pruned.weights / factors).to(weights.dtype),
            errors=pruned.errors / factors.flatten().double().square(),
            rounded=replace(pruned.rounded, exponents=exponents),
        )
