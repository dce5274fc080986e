"""What a strategy and the variants that it picks from must have in common."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Protocol

from evopress.compression.base import Method
from evopress.compression.families import BITS, SPARSITY
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


def level_problems(where: str, search: LevelChoice, variants: Mapping[str, Method]) -> Iterator[str]:
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
    else:
        yield from (
            list(_strategy_problems(where, search, made))
            or list(made.target_problems(search.target, where))
            or _uniform_problems(where, search, made)
        )


def _strategy_problems(where: str, search: LevelChoice, made: Method) -> Iterator[str]:
    """Why a strategy is none for these variants, whatever the target."""
    if made.family.takes_modules:
        yield from _depth_problems(where, search, made)
    elif isinstance(search, ScoresSettings | BruteSettings):
        yield (
            f"{where}.strategy: {search.strategy} drops whole blocks, but {search.variants!r} compresses layers; "
            f"name variants of `method: drop`, or use another strategy"
        )
    elif isinstance(search, OwlSettings) and made.family is not SPARSITY:
        yield f"{where}.variants: OWL chooses sparsities, but {search.variants!r} has none; name pruned variants"


def _uniform_problems(where: str, search: LevelChoice, made: Method) -> Iterator[str]:
    """Why no bit-width meets the target by itself; other levels are known with the layers only."""
    if isinstance(search, UniformSettings) and made.family is BITS and f"{search.target:g}" not in made.labels():
        yield (
            f"{where}.target: {search.target:g} bits is no level of {search.variants!r}, and `uniform` gives every "
            f"layer the same; choose one of {', '.join(made.labels())}"
        )


def _depth_problems(where: str, search: LevelChoice, made: Method) -> Iterator[str]:
    name, unit = search.variants, getattr(made, "unit", "module")
    if isinstance(search, UniformSettings | OwlSettings):
        yield (
            f"{where}.strategy: {search.strategy} chooses levels of linear layers, but {name!r} drops modules; use "
            f"`scores`, `greedy` or `evolution`"
        )
    elif isinstance(search, DpSettings) and search.errors == "table":
        yield f"{where}.errors: modules that {name!r} drops have no errors in a table; choose `propagated`"
    elif isinstance(search, BruteSettings) and unit == "module":
        yield f"{where}.strategy: brute tries whole blocks, but {name!r} drops modules; set its `unit` to `block`"
    elif isinstance(search, ScoresSettings) and unit == "pair":
        yield f"{where}.strategy: scores are of single blocks, but {name!r} drops pairs; set its `unit` to `block`"
