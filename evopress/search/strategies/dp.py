"""Dynamic programming: the levels of the least sum of errors, each layer's taken alone (the baseline of the paper).

What is summed are relative errors, with the same weight for every layer: either those of the layers' own outputs,
which the variants' table has from the Hessians, or those of the model's final hidden states when one layer alone is
at a level and all others are dense (`errors: propagated`). Other weights would be other errors: the sum has no term
for how errors of several layers act together, which is what the paper shows to go wrong.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evopress.compression.base import GroupRule, Method
from evopress.compression.families import LayerFamily
from evopress.search.base import Fitness, Request
from evopress.search.enumeration import Enumeration, fitness_of_each
from evopress.util.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.space import Space


class DynamicProgramming(Enumeration):
    """Dynamic programming: the levels of least summed error of the layers, each taken alone."""

    strategy: Literal["dp"] = "dp"
    errors: Literal["table", "propagated"] = Field(
        "table",
        description="Whose errors are summed: the relative output error of each layer, as made, or that of the model's "
        "final hidden states when the layer alone is compressed.",
    )
    tokens: int = Field(4096, ge=1, description="For errors: propagated: tokens on which each is measured.")
    group_rule: GroupRule = Field(
        "none", description="Which layers share a budget: those of one `size` or `name`, or all (`none`)."
    )
    resolution: int = Field(
        100_000,
        ge=1,
        description="Steps into which a budget is cut where costs have no common measure that is coarser.",
    )
    seed: int = Field(0, ge=0, description="Seed of the choice of tokens.")

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Choose levels by the sum of their errors."""
        from evopress.search.budget import least_error
        from evopress.search.evaluation import SearchResult

        if self.errors == "table":
            return SearchResult(least_error(problem.space, table_errors(problem.space), self.resolution))
        result = super().search(context, problem)
        errors = alone_errors(problem.space, fitness_of_each(result))
        return replace(result, candidate=least_error(problem.space, errors, self.resolution))

    def candidates(self, problem: "SearchProblem") -> "NDArray[np.int16]":
        """Each unit at each of its levels, all others dense, by unit."""
        return each_level_alone(problem.space)

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Modules have no errors of their own."""
        if self.errors == "table" and not isinstance(method.family, LayerFamily):
            yield f"{where}.errors: modules that {self.variants!r} drops have no errors in a table; choose `propagated`"

    def grouping(self) -> GroupRule:
        """As the settings say."""
        return self.group_rule

    def minimizes(self) -> Fitness:
        """The error of final hidden states is measured."""
        return Fitness("hidden_error")

    def workers(self, processes: int) -> int:
        """Errors from the table ask no model."""
        return processes if self.errors == "propagated" else 0

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """None, where errors are in the table."""
        return {"tokens": self.tokens} if self.errors == "propagated" else {}

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """None, where errors are in the table."""
        return super().evaluations(problem, rng) if self.errors == "propagated" else []

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules."""
        if self.errors == "table":
            return "chosen by dynamic programming to make the sum of the layers' own output errors least"
        return (
            "chosen by dynamic programming to make least the sum of the errors that each alone leaves in the last "
            "hidden states"
        )


def table_errors(space: "Space") -> "NDArray[np.float64]":
    """Error of each level as its variant was made, [units, most levels].

    Raises:
        ArtifactError: a level has none.
    """
    import numpy as np

    errors = np.full(space.costs.shape, np.inf)
    for number, unit in enumerate(space.units):
        errors[number, : len(unit.levels)] = [level.error for level in unit.levels]
    if np.isnan(errors).any():
        unit = space.units[int(np.isnan(errors).any(axis=1).argmax())]
        raise ArtifactError(
            f"the variants of {unit.name} have no layer errors; remake them, or choose `errors: propagated`"
        )
    return errors


def each_level_alone(space: "Space") -> "NDArray[np.int16]":
    """Each unit at each of its levels, all others dense: [levels of all units, units], by unit."""
    import numpy as np

    from evopress.search.selection import each_alone
    from evopress.search.space import DENSE_LEVEL

    counts = [len(unit.levels) for unit in space.units]
    dense = np.full(len(counts), DENSE_LEVEL, dtype=np.int16)
    levels = np.concatenate([np.arange(count) for count in counts])
    return each_alone(dense, np.repeat(np.arange(len(counts)), counts), levels)


def alone_errors(space: "Space", measured: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Errors [units, most levels] from those of the candidates of `each_level_alone`."""
    import numpy as np

    errors = np.full(space.costs.shape, np.inf)
    errors[np.arange(space.costs.shape[1]) <= space.top[:, None]] = measured
    return errors
