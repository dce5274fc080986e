"""The same level for every unit: the baseline of every comparison."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from evopress.compression.base import Family, Method, Unit
from evopress.compression.families import Bits, LayerFamily
from evopress.search.base import Strategy
from evopress.search.target import SizeTarget
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.space import Candidate, Space


class Uniform(Strategy):
    """The same level everywhere; the baseline of every comparison."""

    families: ClassVar[tuple[type[Family], ...]] = (LayerFamily,)

    strategy: Literal["uniform"] = "uniform"

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Take the target as the level of each unit."""
        from evopress.search.candidates import uniform_of_size
        from evopress.search.evaluation import SearchResult

        if problem.space.in_bytes:
            return SearchResult(uniform_of_size(problem.space))
        return SearchResult(uniform_candidate(problem.space, self.share, f"{problem.where}.target"))

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Bit-widths that are not made cannot be had."""
        yield from super().problems(where, method)
        if (
            not isinstance(self.target, SizeTarget)
            and isinstance(method.family, Bits)
            and f"{self.target:g}" not in (labels := method.labels())
            and all(label.isdigit() for label in labels)  # of types, which are no numbers, each unit's levels tell
            and not any(method.target_problems(self.target, where))
        ):
            yield (
                f"{where}.target: {self.target:g} bits is no level of {self.variants!r}, and `uniform` gives every "
                f"layer the same; choose one of {', '.join(labels)}"
            )

    def sentence(self) -> str:
        """End of a sentence on levels."""
        return "the same for every layer"


def uniform_candidate(space: "Space", target: float, where: str) -> "Candidate":
    """Level ``target`` everywhere; a unit with one level has no choice and keeps it.

    Args:
        space: units and levels.
        target: value of a level, as in 3 bits; of a sparsity, up to the fraction of one weight.
        where: dotted path of the setting, for messages.

    Raises:
        ConfigError: the target is not a level of each unit, or units without a choice leave too little budget for it.
    """
    import numpy as np

    candidate = np.array([_level_at(unit, target, where) for unit in space.units], dtype=np.int16)
    if space.cost_of(candidate) > space.budget:
        raise ConfigError(
            f"{where}: {target:g} everywhere exceeds the budget, because layers with a single level cost more than "
            f"that; exclude them from the variants, or use the evolution strategy"
        )
    return candidate


def _level_at(unit: Unit, target: float, where: str) -> int:
    values = [level.value for level in unit.levels]
    nearest = min(range(len(values)), key=lambda index: abs(values[index] - target))
    if len(values) == 1 or abs(values[nearest] - target) * unit.parameters < 1:
        return nearest
    below, above = ([value for value in values if (value > target) == over] for over in (False, True))
    offers = " or ".join(f"{value:g}" for value in [*sorted(below)[-1:], *sorted(above)[:1]])
    raise ConfigError(f"{where}: {target:g} is not a level of {unit.name}; the nearest are {offers}")
