"""The (1 + lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evopress.config.base import Name
from evopress.search.base import SelectingStrategy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import Evaluator, TraceRow
    from evopress.search.problem import SearchProblem
    from evopress.search.selection import Round, State
    from evopress.search.space import Candidate


class Evolution(SelectingStrategy):
    """The (1+lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1)."""

    strategy: Literal["evolution"] = "evolution"
    start: Literal["even", "sensitivity"] = Field(
        "even",
        description="Where the search starts: even (the paper's way), or from the effect of each layer alone on the "
        "fitness and on the final hidden states, which finds good configurations with few tokens.",
    )
    start_from: tuple[Name, ...] = Field(
        (),
        description="Other searches whose configurations are starts, too; where one misses the budget, random units "
        "are brought to it. The evolution goes on from the best start.",
    )
    sensitivity_tokens: int = Field(
        512, ge=1, description="For start: sensitivity: tokens on which each layer alone is judged."
    )
    initial_candidates: int = Field(
        128, ge=1, description="Random starts when the target is not one of the levels and no other start is asked for."
    )
    initial_tokens: int = Field(2048, ge=1, description="Tokens on which starts are compared.")
    population: int = Field(
        1, ge=1, description="Parents of the next generation; each offspring comes from a random one of them."
    )
    switches: int | None = Field(
        None, ge=1, description="Level switches of each offspring; null draws min(U(1,3), U(1,3)), as the paper does."
    )

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Start from the best of the starts that the settings ask for, and the uniform candidate.

        These are starts from measured sensitivities, and what other searches have found, brought to the budget where it
        misses it. Where the target is no level, the uniform candidate misses the budget: it is left out, or, where no
        other start is asked for, random candidates near it take its place.
        """
        import numpy as np

        from evopress.search.budget import brought_to_budget
        from evopress.search.candidates import initial_candidates, uniform_start
        from evopress.search.selection import State, Step, first_selection
        from evopress.search.sensitivity import measured_starts

        space = problem.space
        wanted, rows = list["Candidate"](), list["TraceRow"]()
        if self.start == "sensitivity":
            wanted, rows = measured_starts(space, self.sensitivity_tokens, evaluator, rng)
        wanted += [brought_to_budget(candidate, space, rng) for candidate in problem.earlier.values()]
        uniform = uniform_start(space)
        if space.fits(uniform):
            wanted.append(uniform)
        starts = np.unique(wanted or initial_candidates(space, self.initial_candidates, rng), axis=0)
        if len(starts) == 1:
            return State(0, starts), rows
        state, compared = first_selection(starts, Step(self.population, self.initial_tokens), evaluator, rng)
        step = 1 if rows else 0
        return state, [*rows, *(replace(row, step=step) for row in compared)]

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Mutate the population and select the next one."""
        return self.select(state, self._offspring(state.population, problem, rng), evaluator, rng)

    def _offspring(
        self, parents: "NDArray[np.int16]", problem: "SearchProblem", rng: "np.random.Generator"
    ) -> "NDArray[np.int16]":
        from evopress.search.candidates import make_offspring

        return make_offspring(parents, problem.space, self.offspring, rng, self.switches)

    def parents(self) -> int:
        """The population."""
        return self.population

    def depends_on(self) -> tuple[str, ...]:
        """Those that it starts from."""
        return self.start_from

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """By steps and start; ``initial_tokens`` matters only where there may be starts to compare."""
        asked = super().tokens_asked(problem)
        if self.start == "sensitivity":
            asked["sensitivity_tokens"] = self.sensitivity_tokens
        if problem is None or self._compares_starts(problem):
            asked["initial_tokens"] = self.initial_tokens
        return asked

    def _compares_starts(self, problem: "SearchProblem") -> bool:
        from evopress.search.candidates import uniform_start

        others = 2 * (self.start == "sensitivity") + len(self.start_from)
        fits = problem.space.fits(uniform_start(problem.space))
        return others + fits != 1

    def least_tokens(self) -> int:
        """Of all steps and of the start."""
        return min(*self.tokens, self.initial_tokens, self.sensitivity_tokens)

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules."""
        return "found by the evolutionary search of [EvoPress](https://arxiv.org/abs/2410.14649)"
