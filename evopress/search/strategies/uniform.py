"""The same level for every unit: the baseline of every comparison."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from evopress.compression.base import Family, Method, Unit
from evopress.compression.families import Bits, LayerFamily
from evopress.search.base import Strategy
from evopress.search.target import SizeTarget
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.space import Candidate, Space


class Uniform(Strategy):
    """The same level everywhere; the baseline of every comparison."""

    families: ClassVar[tuple[type[Family], ...]] = (LayerFamily,)

    strategy: Literal["uniform"] = "uniform"

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Take the target as the level of each unit."""
        from evopress.search.evaluation import SearchResult

        if problem.space.in_bytes:
            return SearchResult(uniform_of_size(problem.space))
        return SearchResult(uniform_candidate(problem.space, self.share, f"{problem.where}.target"))

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Modules are not at a level; and bit-widths that are not made cannot be had."""
        if not isinstance(method.family, LayerFamily):
            yield (
                f"{where}.strategy: {self.strategy} chooses levels of linear layers, but {self.variants!r} drops "
                f"modules; use `scores`, `greedy` or `evolution`"
            )
        elif (
            not isinstance(self.target, SizeTarget)
            and isinstance(method.family, Bits)
            and f"{self.target:g}" not in method.labels()
            and not any(method.target_problems(self.target, where))
        ):
            yield (
                f"{where}.target: {self.target:g} bits is no level of {self.variants!r}, and `uniform` gives every "
                f"layer the same; choose one of {', '.join(method.labels())}"
            )

    def sentence(self) -> str:
        """End of a sentence on levels."""
        return "the same for every layer"


def uniform_of_size(space: "Space") -> "Candidate":
    """The highest value of a level that fits everywhere, and the rest of the bytes spent from the first unit on.

    A unit that has no level of this value takes the next below, or its lowest. While bytes are left, units go up by a
    level each, in their order, as far as the bytes go.
    """
    import numpy as np

    from evopress.search.budget import fill_budget

    values = sorted({level.value for unit in space.units for level in unit.levels})
    found = np.zeros(len(space.units), dtype=np.int16)
    for value in values:
        counts = [sum(level.value <= value for level in unit.levels) for unit in space.units]
        candidate = np.array([max(0, count - 1) for count in counts], dtype=np.int16)
        if not space.fits(candidate):
            break
        found = candidate
    start = found.copy()

    def first_untouched(units: "NDArray[np.int64]", slack: int) -> int | None:
        untouched = units[found[units] == start[units]]
        return int(untouched[0]) if len(untouched) else None

    for members, slack in zip(space.members, space.slacks(found).tolist(), strict=True):
        fill_budget(found, space, members, slack, first_untouched)
    return found


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
