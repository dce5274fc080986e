"""Brute force over whole blocks: every choice of so many is evaluated on the same tokens, and the best one is kept."""

import math
from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from evopress.compression.base import Family, Method
from evopress.compression.families import Modules
from evopress.search.evaluating import Enumeration, OneTextStrategy
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.problem import SearchProblem
    from evopress.search.space import Space


class BruteForce(OneTextStrategy, Enumeration):
    """Brute force over whole blocks: every choice of blocks to drop is judged; for depth pruning."""

    families: ClassVar[tuple[type[Family], ...]] = (Modules,)

    strategy: Literal["brute"] = "brute"
    max_candidates: int = Field(
        10_000, ge=1, description="Refuse a search of more candidates than this; each is judged on `tokens` tokens."
    )

    def candidates(self, problem: "SearchProblem") -> "NDArray[np.int16]":
        """Every candidate that meets the budget exactly.

        Raises:
            ConfigError: there are more than ``max_candidates``.
        """
        return every_choice(problem.space, self.max_candidates, problem.where)

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Units must be whole blocks that are dropped."""
        yield from super().problems(where, method)
        if getattr(method, "unit", "") == "module":
            yield (
                f"{where}.strategy: brute tries whole blocks, but {self.variants!r} drops modules; set its `unit` to "
                f"`block`"
            )

    def sentence(self) -> str:
        """End of a sentence on dropped modules."""
        return "the best of all possible choices of whole blocks on the search text"


def every_choice(space: "Space", most: int, where: str) -> "NDArray[np.int16]":
    """Every candidate that meets the budget exactly, [C, units], in an order in which neighbours share their prefixes.

    Args:
        space: one group of units with two levels, all of the same costs.
        most: candidates.
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: there are more.
    """
    import numpy as np

    units = len(space.units)
    dropped = units - space.budget // int(space.costs[0, 1])
    count = math.comb(units, dropped)
    if count > most:
        raise ConfigError(
            f"{where}.max_candidates: {dropped} of {units} can be dropped in {count:,} ways, more than {most:,}; raise "
            "it, drop fewer, or use the evolution strategy"
        )
    candidates = np.ones((count, units), dtype=np.int16)
    np.put_along_axis(candidates, np.array(list(combinations(range(units), dropped))), 0, axis=1)
    return candidates
