"""Dynamic programming: the levels of the least sum of errors, each layer's taken alone (the baseline of the paper).

What is summed are either the relative errors of the layers' own outputs, which the variants' table has from the
Hessians, or what the whole model shows when one layer alone is at a level and all others are dense: the relative error
of its final hidden states (`errors: propagated`), or the divergence of its predictions (`errors: kl`), which to first
order is what divergences add up to (HIGGS, arXiv 2411.17525). All layers have the same weight: the sum has no term for
how errors of several layers act together, which is what the paper shows to go wrong.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from evopress.compression.base import GroupRule, Method
from evopress.compression.families import LayerFamily
from evopress.search.base import Fitness, Request
from evopress.search.evaluating import Enumeration, fitness_of_each
from evopress.util.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import Evaluator, SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.selection import Round, State
    from evopress.search.space import Space


class DynamicProgramming(Enumeration):
    """Dynamic programming: the levels of least summed error of the layers, each taken alone."""

    joint: ClassVar[bool] = True

    strategy: Literal["dp"] = "dp"
    errors: Literal["table", "propagated", "kl"] = Field(
        "table",
        description="Whose errors are summed: the relative output error of each layer, as made (`table`), or, when the "
        "layer alone is compressed, that of the model's final hidden states (`propagated`) or the divergence of its "
        "predictions from the dense model's (`kl`). The last two evaluate every level of every layer, in float32.",
    )
    tokens: int = Field(
        4096, ge=1, description="For errors: propagated and kl: tokens on which each level of each layer is measured."
    )
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
        from evopress.search.sensitivity import by_unit_and_level

        if self.errors == "table":
            return SearchResult(least_error(problem.space, table_errors(problem.space), self.resolution))
        result = super().search(context, problem)
        errors = by_unit_and_level(problem.space, fitness_of_each(result))
        return replace(result, candidate=least_error(problem.space, errors, self.resolution))

    def candidates(self, problem: "SearchProblem") -> "NDArray[np.int16]":
        """Each unit at each of its levels, all others dense, by unit."""
        from evopress.search.sensitivity import each_at_every_level

        return each_at_every_level(problem.space)

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Evaluate the first part."""
        return super().first_round(problem, self._single_effects(evaluator), rng)

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Evaluate the next part."""
        return super().next_round(state, problem, self._single_effects(evaluator), rng)

    def _single_effects(self, evaluator: "Evaluator") -> "Evaluator":
        from evopress.search.sensitivity import SingleEffects

        return SingleEffects(evaluator, in_pieces=self.errors == "kl")

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Modules have no errors of their own."""
        if self.errors == "table" and not isinstance(method.family, LayerFamily):
            yield (
                f"{where}.errors: modules that {self.variants!r} drops have no errors in a table; choose `propagated` "
                "or `kl`"
            )
        if self.errors == "propagated" and method.compresses_embedding:
            yield (
                f"{where}.errors: {self.variants!r} has levels of the head, which comes after the final hidden states "
                "whose error `propagated` measures; choose `kl`"
            )

    def grouping(self) -> GroupRule:
        """As the settings say."""
        return self.group_rule

    def minimizes(self) -> Fitness:
        """The divergence, or the error of final hidden states."""
        return Fitness("kl" if self.errors == "kl" else "hidden_error")

    def workers(self, processes: int) -> int:
        """Errors from the table ask no model."""
        return processes if self.errors != "table" else 0

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """None, where errors are in the table."""
        return {"tokens": self.tokens} if self.errors != "table" else {}

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """None, where errors are in the table."""
        from evopress.search.sensitivity import piece_length

        if self.errors == "table":
            return []
        longest = piece_length(self.tokens) if self.errors == "kl" else None
        return [replace(request, precise=True, longest=longest) for request in super().evaluations(problem, rng)]

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules."""
        if self.errors == "table":
            return "chosen by dynamic programming to make the sum of the layers' own output errors least"
        alone = {
            "propagated": "errors that each alone leaves in the last hidden states",
            "kl": "divergences from the original that each alone causes",
        }
        return f"chosen by dynamic programming to make least the sum of the {alone[self.errors]}"


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
