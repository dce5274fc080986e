"""Evaluating a given list of candidates on the same tokens, a part a round; the best one is found."""

from typing import TYPE_CHECKING, ClassVar

from evopress.search.base import Request, RoundStrategy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import Evaluator, SearchResult
    from evopress.search.problem import SearchProblem
    from evopress.search.selection import Round, State


class Enumeration(RoundStrategy):
    """A strategy that evaluates all candidates of a list; the class that is made of it has `tokens` for each.

    Evaluations are comparable across rounds: every round draws the tokens anew with the same seed. In the trace, the
    rows of a round that are numbered from 0 are its candidates, in order.
    """

    rounds: ClassVar[str] = "parts"
    part: ClassVar[int] = 64
    """Candidates that are evaluated together, and lost if the search is killed."""
    if TYPE_CHECKING:
        tokens: int

    def candidates(self, problem: "SearchProblem") -> "NDArray[np.int16]":
        """All of them, [C, units]."""
        raise NotImplementedError

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Evaluate the first part."""
        from evopress.search.selection import Step, first_selection

        part, step = self.candidates(problem)[: self.part], Step(1, self.tokens)
        return first_selection(part, step, evaluator, self._same_again())

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Evaluate the next part, and the best so far."""
        from evopress.search.selection import Step, select_next

        first = (state.generation + 1) * self.part
        part = self.candidates(problem)[first : first + self.part]
        return select_next(state, part, [Step(1, self.tokens)], evaluator, self._same_again())

    def remaining(self, state: "State", problem: "SearchProblem") -> int:
        """Parts that are left."""
        return -(-len(self.candidates(problem)) // self.part) - 1 - state.generation

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """All parts."""
        candidates = self.candidates(problem)
        starts = range(0, len(candidates), self.part)
        parts = [candidates[start : start + self.part] for start in starts]
        return [Request(part, self.tokens, round=number) for number, part in enumerate(parts, 1)]

    def _same_again(self) -> "np.random.Generator":
        import numpy as np

        return np.random.Generator(np.random.PCG64(self.seed))


def fitness_of_each(result: "SearchResult") -> "NDArray[np.float64]":
    """Fitness of each candidate of an enumeration, [C]."""
    import numpy as np

    return np.array([record["fitness"] for record in result.records if record["candidate"] >= 0])
