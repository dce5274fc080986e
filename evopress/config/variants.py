"""How compressed variants of each linear layer are made."""

from typing import Literal

from pydantic import Field, field_validator

from evopress.config.base import Section


class HessianSettings(Section):
    """How the Hessians are accumulated."""

    shards: int = Field(1, ge=1, description="Token shards that run as separate jobs and are then summed.")


class GptqSettings(Section):
    """GPTQ (arXiv 2210.17323) at several bit-widths."""

    method: Literal["gptq"] = "gptq"
    bits: tuple[int, ...] = Field((2, 3, 4, 5, 6), min_length=1, description="Bit-widths to offer, from 2 to 8.")
    group_size: int | None = Field(64, ge=1, description="Inputs that share a scale; null is one scale per channel.")
    symmetric: bool = Field(False, description="Grid symmetric about zero, without a zero point.")
    activation_order: bool = Field(True, description="Quantize columns by decreasing Hessian diagonal.")
    clip_search: bool = Field(True, description="Clip each group's range where that rounds with less error.")
    damping: float = Field(0.01, gt=0, lt=1, description="Share of the mean Hessian diagonal added to the diagonal.")
    block_size: int = Field(128, ge=1, description="Columns between two lazy updates of the remaining ones.")
    exclude: tuple[str, ...] = Field((), description="Patterns of layer names that stay dense, as in `*.down_proj`.")

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= b <= 8 for b in bits):
            raise ValueError(f"bit-widths must lie between 2 and 8, got {list(bits)}")
        if len(set(bits)) != len(bits):
            raise ValueError(f"a bit-width is named twice in {list(bits)}")
        return tuple(sorted(bits))


VariantSettings = GptqSettings
"""Settings of any method; they differ in `method`."""
