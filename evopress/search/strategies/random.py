"""Random search: as many candidates as evolution evaluates, on as many tokens, but from all over the space."""

from typing import TYPE_CHECKING, Literal

from evopress.search.evaluating import SelectingStrategy

if TYPE_CHECKING:
    import numpy as np

    from evopress.search.evaluation import Evaluator
    from evopress.search.problem import SearchProblem
    from evopress.search.selection import Round, State


class RandomSearch(SelectingStrategy):
    """Random search: candidates from all over the space and the best so far, judged in the same steps."""

    strategy: Literal["random"] = "random"

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Any candidate."""
        from evopress.search.candidates import random_candidate
        from evopress.search.selection import State

        return State(0, random_candidate(problem.space, rng)[None]), []

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Draw new ones; the best so far is admitted to the last selection step, as evolution's parent is."""
        from evopress.search.candidates import random_candidates

        drawn = random_candidates(problem.space, self.offspring, rng)
        return self.select(state, drawn[(drawn != state.parent).any(axis=1)], evaluator, rng)

    def sentence(self) -> str:
        """End of a sentence on levels."""
        return "the best of random draws, judged as a whole"
