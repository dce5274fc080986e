"""How compressed variants of each linear layer are made."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from evopress.compression.base import LayerMethod, Method
from evopress.compression.families import BITS, MODULES, SPARSITY
from evopress.config.base import Section


class HessianSettings(Section):
    """How the Hessians are accumulated."""

    shards: int = Field(1, ge=1, description="Token shards that run as separate jobs and are then summed.")
    keep: bool = Field(
        True, description="False removes a block's Hessians when all that need them are done; new levels remake them."
    )


class _MethodSettings(LayerMethod):
    """What all methods share."""

    propagation: Literal["dense", "compressed"] = Field(
        "dense",
        description="Whose outputs the Hessians of a block see: those of the dense blocks before it, or of the "
        "compressed ones at `propagation_level`, block after block, in a chain of jobs with Hessians of its own.",
    )
    propagation_level: str | None = Field(
        None, description='With `propagation: compressed`, the level, as in `"3"` (bits), `"0"` or `"2:4"`.'
    )

    @model_validator(mode="after")
    def _check_propagation(self) -> Self:
        level, labels = self.propagation_level, self.labels()
        if self.propagation == "dense" and level is not None:
            raise ValueError("propagation_level: nothing is compressed underway; set `propagation: compressed` as well")
        if self.propagation == "compressed" and level not in labels:
            what = "needed with `propagation: compressed`" if level is None else f"{level!r} is not made"
            raise ValueError(f"propagation_level: {what}; choose one of {', '.join(labels)} (in quotes)")
        return self

    def labels(self) -> list[str]:
        """Labels of the levels that a layer with room for all of them has."""
        raise NotImplementedError


class GptqSettings(_MethodSettings):
    """GPTQ (arXiv 2210.17323) at several bit-widths."""

    family = BITS
    method: Literal["gptq"] = "gptq"
    bits: tuple[int, ...] = Field((2, 3, 4, 5, 6), min_length=1, description="Bit-widths to offer, from 2 to 8.")
    group_size: int | None = Field(64, ge=1, description="Inputs that share a scale; null is one scale per channel.")
    symmetric: bool = Field(False, description="Grid symmetric about zero, without a zero point.")
    activation_order: bool = Field(True, description="Quantize columns by decreasing Hessian diagonal.")
    clip_search: bool = Field(True, description="Clip each group's range where that rounds with less error.")
    damping: float = Field(0.01, gt=0, lt=1, description="Share of the mean Hessian diagonal added to the diagonal.")
    block_size: int = Field(128, ge=1, description="Columns between two lazy updates of the remaining ones.")

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


class _SparsitySettings(_MethodSettings):
    """Which weights may go; the levels are the same whatever method chooses them."""

    family = SPARSITY

    sparsity: float = Field(0.5, gt=0, lt=1, description="Level 0: the share of each layer's weights that become zero.")
    step: int = Field(1_000_000, ge=1, description="Weights between two levels, the same for layers of every size.")
    levels: int = Field(8, ge=0, description="Levels on either side of level 0, where a layer has room for them.")
    patterns: tuple[str, ...] = Field(
        (),
        description="Patterns `n:m` (n of every m neighbouring weights are kept), one level each, in place of "
        "`sparsity`, `step` and `levels`, which put zeros anywhere.",
    )

    @field_validator("patterns")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            parse_pattern(pattern)
        if len(set(patterns)) != len(patterns):
            raise ValueError(f"a pattern is named twice in {list(patterns)}")
        return patterns

    def labels(self) -> list[str]:
        """Patterns, or steps from the target."""
        return list(self.patterns) or [step_label(steps) for steps in range(-self.levels, self.levels + 1)]


class SparseGptSettings(_SparsitySettings):
    """SparseGPT (arXiv 2301.00774): weights that are kept make up for those that go."""

    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, lt=1, description="Share of the mean Hessian diagonal added to the diagonal.")
    block_size: int = Field(128, ge=1, description="Columns among which a mask is chosen and errors are made up for.")
    even_blocks: bool = Field(
        False, description="Take as much from every block of columns, as the paper does, and not where it costs least."
    )


class WandaSettings(_SparsitySettings):
    """Wanda (arXiv 2306.11695): in each output row, the least weights times the norm of their inputs go."""

    method: Literal["wanda"] = "wanda"


class MagnitudeSettings(_SparsitySettings):
    """In each layer, the least weights go."""

    method: Literal["magnitude"] = "magnitude"


class DropSettings(Method):
    """Attention and MLP modules that may leave the model (depth pruning)."""

    family = MODULES
    method: Literal["drop"] = "drop"
    unit: Literal["module", "block", "pair"] = Field(
        "module",
        description="What is dropped as one: an attention or MLP module, a block, or two consecutive blocks (0 and 1, "
        "2 and 3, ...).",
    )
    exclude: tuple[str, ...] = Field(
        (), description="Patterns of module names that always stay, as in `*.layers.0.attn` or `*.mlp`."
    )


def needs_chain(settings: object) -> bool:
    """Whether the blocks of these variants are made one after the other."""
    return isinstance(settings, _MethodSettings) and settings.propagation == "compressed"


def needs_hessians(settings: object) -> bool:
    """Whether these variants rest on the Hessians of the dense model."""
    return isinstance(settings, _MethodSettings) and settings.propagation == "dense"


SparsitySettings = SparseGptSettings | WandaSettings | MagnitudeSettings
"""Settings of the methods whose levels are sparsities."""
CompressionSettings = Annotated[GptqSettings | SparsitySettings, Field(discriminator="method")]
"""Settings of the methods that make new weights for linear layers."""
VariantSettings = Method
