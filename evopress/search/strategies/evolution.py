"""The (1 + lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1)."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from evopress.compression.base import Method
from evopress.config.base import Name
from evopress.search.evaluating import SelectingStrategy
from evopress.search.strategies.scores import BlockScores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.base import EffectsSettings
    from evopress.search.evaluation import Evaluator, SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.selection import Round, State
    from evopress.search.space import Candidate


POOL = 64
"""Random offspring for each that is wanted, where single steps tell which promise most."""


class EvolvingStrategy(SelectingStrategy):
    """A strategy that mutates and selects: all of the evolutionary search but its name."""

    joint: ClassVar[bool] = True

    start: Literal["uniform", "sensitivity", "scores"] = Field(
        "uniform",
        description="Where the search starts: uniform (the paper's way); from the effect of each layer alone on the "
        "fitness and on the final hidden states, which finds good configurations with few tokens; or, for depth, from "
        "the blocks that change the direction of hidden states least (cosine of input and output), each alone or "
        "consecutive ones together (as `scores` with `cosine` "
        "and `window_cosine`).",
    )
    start_from: tuple[Name, ...] = Field(
        (),
        description="Other searches whose configurations are starts, too; where one misses the budget, random units "
        "are brought to it. The evolution goes on from the best start.",
    )
    sensitivity_tokens: int = Field(
        512,
        ge=1,
        description="For start: sensitivity: tokens on which each layer alone is judged, once for all searches that "
        "ask for the same.",
    )
    sensitivity_levels: Literal[1, 2] = Field(
        1,
        description="For start: sensitivity: judge each layer at its middle level alone, or also at its lowest, which "
        "tells more where the budget is far below the middle, for twice as many tokens.",
    )
    initial_candidates: int = Field(
        128, ge=1, description="Random starts when the target is not one of the levels and no other start is asked for."
    )
    initial_tokens: int = Field(2048, ge=1, description="Tokens on which starts are compared.")
    population: int = Field(
        1, ge=1, description="Parents of the next generation; each offspring comes from a random one of them."
    )
    switches: int | None = Field(
        None, ge=1, description="Moves of each offspring; null draws min(U(1,3), U(1,3)) of them, as the paper does."
    )

    step_tokens: int = Field(
        0,
        ge=0,
        description="Tokens on which each generation judges every step of one unit from the best choice, a level up or "
        f"down; offspring are then those, of {POOL} times as many random ones, whose steps have the least sum. 0 takes "
        "random offspring (the paper's way).",
    )

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Run all generations, or those that are left where a killed search stopped."""
        if self.start != "scores":
            return super().search(context, problem)
        from evopress.search.evaluation import Effort

        settings: dict[str, Any] = {"variants": self.variants, "target": self.target, "seed": self.seed}
        settings["tokens"] = max(2, self.initial_tokens)
        started, tokens, earlier = time.monotonic(), 0, dict(problem.earlier)
        for score in _SCORES:
            found = BlockScores(**settings, score=score).search(context, problem)
            tokens += found.effort.tokens
            earlier[f"the score {score}"] = found.candidate  # no search's name
        spent = Effort(tokens, time.monotonic() - started)
        result = super().search(context, replace(problem, earlier=earlier))
        return replace(result, effort=spent + result.effort)

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Start from the best of the starts that the settings ask for, and the uniform candidate.

        These are starts from measured sensitivities, and what other searches have found, brought to the budget where it
        misses it. Where the target is no level, the uniform candidate misses the budget: it is left out, or, where no
        other start is asked for, random candidates near it take its place. Of several variants, each has its own.
        """
        import numpy as np

        from evopress.search.budget import brought_to_budget
        from evopress.search.candidates import initial_candidates, uniform_starts
        from evopress.search.selection import State, Step, first_selection
        from evopress.search.sensitivity import measured_starts

        space, wanted = problem.space, list["Candidate"]()
        if problem.effects is not None:
            wanted = measured_starts(space, problem.effects)
        wanted += [brought_to_budget(candidate, space, rng) for candidate in problem.earlier.values()]
        wanted += uniform_starts(space)
        starts = np.unique(wanted or initial_candidates(space, self.initial_candidates, rng), axis=0)
        if len(starts) == 1:
            return State(0, starts), []
        return first_selection(starts, Step(self.population, self.initial_tokens), evaluator, rng)

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Mutate the population and select the next one."""
        from evopress.search.sensitivity import most_promising

        if not self.step_tokens:
            return self.select(state, self._offspring(state.population, self.offspring, problem, rng), evaluator, rng)
        pool = self._offspring(state.population[:1], POOL * self.offspring, problem, rng)
        offspring = most_promising(state.parent, pool, self.offspring, problem.space, self.step_tokens, evaluator, rng)
        return self.select(state, offspring, evaluator, rng)

    def _offspring(
        self, parents: "NDArray[np.int16]", count: int, problem: "SearchProblem", rng: "np.random.Generator"
    ) -> "NDArray[np.int16]":
        from evopress.search.candidates import make_offspring
        from evopress.search.moves import move_in

        return make_offspring(parents, problem.space, count, rng, self.switches, move_in(problem.space))

    def parents(self) -> int:
        """The population."""
        return self.population

    def depends_on(self) -> tuple[str, ...]:
        """Those that it starts from."""
        return self.start_from

    def effects(self) -> "EffectsSettings | None":
        """Those of all units, where it starts from them."""
        from evopress.search.base import EffectsSettings

        if self.start != "sensitivity":
            return None
        return EffectsSettings(
            variants=self.variants,
            tied=self.tied,
            levels=self.levels,
            fitness=self.fitness,
            top_k=self.top_k if self.fitness == "topk_kl" else None,
            tokens=self.sensitivity_tokens,
            each=self.sensitivity_levels,
        )

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """By steps and start; ``initial_tokens`` matters only where there may be starts to compare."""
        asked = super().tokens_asked(problem)
        if self.start == "sensitivity":
            asked["sensitivity_tokens"] = self.sensitivity_tokens
        if self.step_tokens:
            asked["step_tokens"] = self.step_tokens
        if problem is None or self.start == "scores" or self._compares_starts(problem):
            asked["initial_tokens"] = self.initial_tokens
        return asked

    def _compares_starts(self, problem: "SearchProblem") -> bool:
        from evopress.search.candidates import uniform_starts

        others = {"uniform": 0, "sensitivity": 2, "scores": len(_SCORES)}[self.start] + len(self.start_from)
        return others + len(uniform_starts(problem.space)) != 1

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Scores are of whole blocks that are dropped."""
        yield from super().problems(where, method)
        if self.start == "scores" and not (method.family.takes_modules and getattr(method, "unit", "") != "pair"):
            yield f"{where}.start: scores are of single blocks to drop, not of {self.variants!r}; choose `sensitivity`"

    def least_tokens(self) -> int:
        """Of all steps and of the start."""
        return min(*self.tokens, self.initial_tokens, self.sensitivity_tokens)

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules."""
        start = _STARTS[self.start] + (f" and from {', '.join(self.start_from)}" if self.start_from else "")
        chosen = ", chosen by what single steps do," if self.step_tokens else ""
        return (
            f"found by the evolutionary search of [EvoPress](https://arxiv.org/abs/2410.14649), which started {start} "
            f"and judged {self.generations} generations of {self.offspring}{chosen} on up to "
            f"{max(self.tokens):,} tokens"
        )


_SCORES: tuple[Literal["cosine"], Literal["window_cosine"]] = ("cosine", "window_cosine")
"""Neither is the better one at every depth, which config/studies/budgets-depth.yaml shows."""
_STARTS = {
    "uniform": "uniformly",
    "sensitivity": "from the effect of each unit alone",
    "scores": "from the blocks that change the direction of hidden states least",
}


class Evolution(EvolvingStrategy):
    """The (1+lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1)."""

    strategy: Literal["evolution"] = "evolution"
