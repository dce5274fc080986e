"""Greedy descent on the measured fitness.

Every unit starts at its most expensive level. In each round every unit that can still go down a level, in a group that
is over its budget, is evaluated with that one step taken; the steps that raise the fitness least for the cost that they
save are taken. For depth pruning with one step a round this is the greedy removal of modules, one after the other, each
time the one whose loss changes the output least (compare FinerCut, arXiv 2405.18218).

Where costs differ, the last step may save more than it has to; what is then free is spent the same way, upwards.
"""

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evopress.search.evaluating import GroupedStrategy, OneTextStrategy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import Evaluator
    from evopress.search.problem import SearchProblem
    from evopress.search.selection import Round, State
    from evopress.search.space import Candidate, Space


class Greedy(OneTextStrategy, GroupedStrategy):
    """Greedy descent: from every unit at its dearest level, by the step down that costs the fitness least."""

    strategy: Literal["greedy"] = "greedy"
    per_round: int = Field(
        1, ge=1, description="Steps down taken at once, the best ones, before all are judged again: more is faster."
    )

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Every unit at its most expensive level."""
        from evopress.search.selection import State

        return State(0, problem.space.top[None]), []

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Evaluate every possible step of one unit on the same tokens, and take the best ones.

        Returns:
            The new state, and a row for each evaluation: the candidate before the step as the parent, and the first of
            the steps that are taken as accepted.

        Raises:
            SearchError: no step has a fitness.
        """
        import numpy as np

        from evopress.search.evaluation import PARENT, TraceRow
        from evopress.search.selection import State, evaluate, require_number

        space, current = problem.space, state.parent
        units, moved = _steps(space, current)
        way = _direction(space, current)
        minibatch = evaluator.draw(self.tokens, rng)
        found = evaluate(np.vstack([current[None], moved]), minibatch, evaluator, {})
        fitness = np.array([evaluation.fitness for evaluation in found])
        saved = np.abs(space.costs[units, current[units]] - space.costs[units, current[units] + way])
        order = np.argsort((fitness[1:] - fitness[0]) / np.maximum(saved, 1), kind="stable")  # NaN last
        require_number(float(fitness[1:][order[0]]))
        new = current.copy()
        for unit in units[order[: self.per_round]]:
            if _possible(space, new, way)[unit]:
                new[unit] += way
        rows = [
            TraceRow(
                generation=state.generation + 1,
                step=0,
                candidate=PARENT if number == 0 else number - 1,
                minibatch=minibatch,
                fitness=evaluation.fitness,
                fitness_by_sequence=evaluation.by_sequence,
                accepted=number == order[0] + 1,
            )
            for number, evaluation in enumerate(found)
        ]
        return State(state.generation + 1, new[None]), rows

    def remaining(self, state: "State", problem: "SearchProblem") -> int:
        """0 at the end, else about as many rounds as steps of mean cost fit into the excess."""
        space, candidate = problem.space, state.parent
        if space.fits(candidate):
            return int(_possible(space, candidate, 1).any())
        steps = 0.0
        for members, budget in zip(space.members, space.group_budgets, strict=True):
            span = space.costs[members, space.top[members]] - space.costs[members, 0]
            mean = max(1.0, float(span.sum()) / max(1, int(space.top[members].sum())))
            steps += max(0, space.cost_of(candidate, members) - budget) / mean
        return max(1, math.ceil(steps / self.per_round))

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules."""
        return "found by a greedy descent on what each step costs the whole model"


def _steps(space: "Space", candidate: "Candidate") -> "tuple[NDArray[np.int64], NDArray[np.int16]]":
    """Units that can take a step, [n], and the candidate with each of these steps taken alone, [n, units]."""
    import numpy as np

    from evopress.search.selection import each_alone

    way = _direction(space, candidate)
    units = np.flatnonzero(_possible(space, candidate, way))
    return units, each_alone(candidate, units, candidate[units] + way)


def _direction(space: "Space", candidate: "Candidate") -> int:
    """Down (-1) until the budget holds, then up."""
    return 1 if space.fits(candidate) else -1


def _possible(space: "Space", candidate: "Candidate", way: int) -> "NDArray[np.bool_]":
    """Which units may go a level down, or up, [units]: down where their group exceeds its budget, up within it."""
    import numpy as np

    room = space.slacks(candidate)[space.group_of]
    if way < 0:
        return (candidate > 0) & (room < 0)
    above = np.minimum(candidate + 1, space.top)
    units = np.arange(len(candidate))
    return (candidate < space.top) & (space.costs[units, above] - space.costs[units, candidate] <= room)
