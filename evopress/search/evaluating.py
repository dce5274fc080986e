"""Kinds of strategies that evaluate candidates by the model, with the settings that they share.

Snakemake imports this module while it parses, so whatever takes long to import is imported inside functions.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from evopress.compression.base import GroupRule
from evopress.search.base import Fitness, Request
from evopress.search.rounds import RoundStrategy, rehearse
from evopress.search.target import SizeTarget

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import Evaluator, SearchResult
    from evopress.search.problem import SearchProblem
    from evopress.search.selection import Round, State

Count = Annotated[int, Field(ge=1)]


class EvaluatingStrategy(RoundStrategy):
    """A strategy whose settings say what it minimizes."""

    fitness: Literal["kl", "topk_kl", "perplexity"] = Field(
        "kl", description="What selection minimizes: divergence from the dense model, or perplexity."
    )
    top_k: int = Field(100, ge=1, description="For topk_kl: tokens of the dense model's distribution kept apart.")
    seed: int = Field(0, ge=0, description="Seed of the mutations and of the choice of tokens.")

    def minimizes(self) -> Fitness:
        """The fitness of the settings."""
        return Fitness(self.fitness, self.top_k)

    def least_tokens(self) -> int:
        """Fewest tokens on which a candidate is evaluated."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_fitness(self) -> Self:
        if self.fitness == "perplexity" and self.least_tokens() < 2:
            raise ValueError("tokens: perplexity predicts the next token, so each step needs at least 2")
        return self


class GroupedStrategy(EvaluatingStrategy):
    """A strategy in which only layers of a group trade levels."""

    group_rule: GroupRule = Field(
        "size",
        description="Which layers may trade levels; where the target is the size of a file, by default any.",
    )

    @model_validator(mode="before")
    @classmethod
    def _trade_bytes(cls, values: Any) -> Any:
        sized = isinstance(values, dict) and isinstance(values.get("target"), dict | SizeTarget)
        # A byte is a byte, and the embedding has no equal to trade with.
        return {"group_rule": "none", **values} if sized else values

    def grouping(self) -> GroupRule:
        """As the settings say."""
        return self.group_rule


class SelectingStrategy(GroupedStrategy):
    """Generations of candidates, selected in steps of more and more tokens."""

    rounds: ClassVar[str] = "generations"
    keeps_the_best: ClassVar[bool] = True

    generations: int = Field(150, ge=1, description="Rounds of mutation and selection.")
    offspring: int = Field(128, ge=1, description="Candidates made in each generation (lambda).")
    survivors: tuple[Count, ...] = Field(
        (16, 4, 1), description="Candidates kept by each selection step, ending in population."
    )
    tokens: tuple[Count, ...] = Field((2048, 16384, 131072), description="Tokens on which each step judges.")
    confidence: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability with which a parent is kept, in each generation, that is better than all new "
        "candidates but may look worse on the last step's tokens, which are then of eight sequences, as far as the "
        "text has so many; 0 keeps what looks best (the paper's way).",
    )

    def parents(self) -> int:
        """Candidates that a generation leaves to the next."""
        return 1

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """By the steps: the one that sees most, or each where there is a problem."""
        if problem is None:
            return {"tokens": max(self.tokens)}
        return {f"tokens[{step}]": tokens for step, tokens in enumerate(self.tokens)}

    def least_tokens(self) -> int:
        """Of all steps."""
        return min(self.tokens, default=2)

    def remaining(self, state: "State", problem: "SearchProblem") -> int:
        """Generations that are left."""
        return self.generations - state.generation

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """As of any rounds; random fitness has no confidence, nor several sequences."""
        return rehearse(self.model_copy(update={"confidence": 0.0}), problem, rng)

    def select(
        self,
        state: "State",
        offspring: "NDArray[np.int16]",
        evaluator: "Evaluator",
        rng: "np.random.Generator",
    ) -> "Round":
        """The next generation from ``offspring`` [n, units] and the present one, by the steps of the settings."""
        from evopress.search.selection import Step, select_next

        steps = [Step(kept, tokens) for kept, tokens in zip(self.survivors, self.tokens, strict=True)]
        return select_next(state, offspring, steps, evaluator, rng, self.confidence)

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if len(self.survivors) != len(self.tokens):
            raise ValueError(
                f"survivors has {len(self.survivors)} steps and tokens has {len(self.tokens)}: give one each per step"
            )
        if self.survivors[-1:] != (self.parents(),):
            raise ValueError(
                f"survivors must end in population ({self.parents()}, the next parents), got {list(self.survivors)}"
            )
        if any(later > earlier for earlier, later in zip(self.survivors, self.survivors[1:], strict=False)):
            raise ValueError(f"survivors must not grow from step to step, got {list(self.survivors)}")
        if self.survivors[0] > self.offspring:
            raise ValueError(f"survivors: the first step keeps {self.survivors[0]} of only {self.offspring} offspring")
        return self


class OneTextStrategy(EvaluatingStrategy):
    """A strategy that evaluates every candidate on equally many tokens."""

    tokens: int = Field(4096, ge=1, description="Tokens on which each candidate is judged.")

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """By each candidate."""
        return {"tokens": self.tokens}

    def least_tokens(self) -> int:
        """The same for all."""
        return self.tokens


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
