"""What a strategy and the variants that it picks from must have in common: quantization, sparsity or depth pruning."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Protocol

from evopress.compression.settings import DropSettings, GptqSettings, VariantSettings, pattern_sparsity
from evopress.search.settings import (
    BruteSettings,
    DpSettings,
    OwlSettings,
    ScoresSettings,
    UniformSettings,
)


class LevelChoice(Protocol):
    """Settings of what picks levels from variants: a search, or an experiment."""

    @property
    def variants(self) -> str:
        """Name of the variants."""

    @property
    def target(self) -> float:
        """Budget, as the family of the variants counts it."""


def level_problems(where: str, search: LevelChoice, variants: Mapping[str, VariantSettings]) -> Iterator[str]:
    """Why a search, or an experiment, cannot pick from its variants.

    Args:
        where: dotted path of its settings.
        search: its settings.
        variants: all there are, by name.
    """
    made = variants.get(search.variants)
    if made is None:
        near = get_close_matches(search.variants, variants, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(variants) or 'none'}"
        yield f"{where}.variants: no variants are named {search.variants!r}: {hint}"
    elif isinstance(made, DropSettings):
        yield from _depth_problems(where, search, made)
    elif isinstance(search, ScoresSettings | BruteSettings):
        yield (
            f"{where}.strategy: {search.strategy} drops whole blocks, but {search.variants!r} compresses layers; "
            f"name variants of `method: drop`, or use another strategy"
        )
    elif not isinstance(made, GptqSettings):
        if search.target >= 1:
            yield f"{where}.target: {search.target:g} is no sparsity below 1, which is what {search.variants!r} offers"
        elif made.patterns and search.target > (highest := max(map(pattern_sparsity, made.patterns))):
            yield f"{where}.target: {search.target:g} sparsity is above the highest level ({highest:g})"
    elif isinstance(search, OwlSettings):
        yield f"{where}.variants: OWL chooses sparsities, but {search.variants!r} is quantized; name pruned variants"
    elif search.target < min(made.bits):
        yield f"{where}.target: {search.target:g} bits is below the lowest level ({min(made.bits)})"
    elif search.target > max(made.bits):
        yield f"{where}.target: {search.target:g} bits is above the highest level ({max(made.bits)})"
    elif isinstance(search, UniformSettings) and search.target not in made.bits:
        levels = ", ".join(made.labels())
        yield (
            f"{where}.target: {search.target:g} bits is no level of {search.variants!r}, and `uniform` gives every "
            f"layer the same; choose one of {levels}"
        )


def _depth_problems(where: str, search: LevelChoice, made: DropSettings) -> Iterator[str]:
    name, target = search.variants, search.target
    if isinstance(search, UniformSettings | OwlSettings):
        yield (
            f"{where}.strategy: {search.strategy} chooses levels of linear layers, but {name!r} drops modules; use "
            f"`scores`, `greedy` or `evolution`"
        )
    elif isinstance(search, DpSettings) and search.errors == "table":
        yield f"{where}.errors: modules that {name!r} drops have no errors in a table; choose `propagated`"
    elif isinstance(search, BruteSettings) and made.unit == "module":
        yield f"{where}.strategy: brute tries whole blocks, but {name!r} drops modules; set its `unit` to `block`"
    elif isinstance(search, ScoresSettings) and made.unit == "pair":
        yield f"{where}.strategy: scores are of single blocks, but {name!r} drops pairs; set its `unit` to `block`"
    elif not target.is_integer():
        yield f"{where}.target: {target:g} is no number of blocks to drop, which is what {name!r} offers"
    elif made.unit == "pair" and target % 2:
        yield f"{where}.target: {target:g} blocks are no whole pairs; choose an even number, or `unit: block`"
