"""A front: the whole curve of size against quality, one search for each of several sizes of the file.

All sizes start from one set of single effects, which is most of what a short search takes. Beyond that a size depends
on no other: its result is that of a search for this size alone, sizes are searched side by side, and a size that is
added makes no other one run again. At the end each judges what it has found on the same tokens, so that the report can
tell whether a larger file is at least as good as a smaller one.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from evopress.compression.base import GroupRule, Method
from evopress.search.strategies.evolution import EvolvingStrategy
from evopress.search.target import Bytes, SizeTarget, Target, megabytes

if TYPE_CHECKING:
    import numpy as np

    from evopress.search.evaluation import Evaluator
    from evopress.search.problem import SearchProblem
    from evopress.search.selection import Round, State

DIGITS = 3
"""Of sizes between two ends, which give searches their names."""


class Front(EvolvingStrategy):
    """The curve of size against quality: an evolutionary search for each of several sizes, from shared effects."""

    strategy: Literal["front"] = "front"
    target: Target = Field(
        default_factory=lambda: SizeTarget(bytes=1),  # until each size has a search of its own
        description="Of a front: not given, as `sizes` or `from`, `to` and `points` say what the files hold at most.",
    )
    sizes: tuple[Bytes, ...] | None = Field(
        None,
        exclude=True,  # what it stands for are searches of their own, each of which has a target
        description="Most that each file may hold, as in `[55 MB, 65 MB, 75 MB]`, ascending: one search for each, "
        "named `<name>-55mb` and so on.",
    )
    smallest: Bytes | None = Field(
        None, alias="from", exclude=True, description="Instead of `sizes`, with `to` and `points`: the smallest size."
    )
    largest: Bytes | None = Field(None, alias="to", exclude=True, description="The largest size.")
    points: int | None = Field(
        None, ge=2, exclude=True, description="How many sizes, evenly spaced (those between the ends in three digits)."
    )
    group_rule: GroupRule = Field("none", description="Which layers may trade bytes.")
    start: Literal["uniform", "sensitivity", "scores"] = Field(
        "sensitivity", description="Where each size starts; from `sensitivity`, all share the effects of single layers."
    )
    final_tokens: int = Field(
        4096, ge=2, description="Tokens on which what was found is judged at the end, the same for all sizes."
    )

    def sizes_wanted(self) -> tuple[int, ...]:
        """Sizes of the files, in bytes; none where this is one of the searches that a front stands for."""
        if self.sizes is not None or self.smallest is None or self.largest is None or self.points is None:
            return self.sizes or ()
        step = (self.largest - self.smallest) / (self.points - 1)
        between = [float(f"{self.smallest + step * index:.{DIGITS}g}") for index in range(1, self.points - 1)]
        return (self.smallest, *map(int, between), self.largest)

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """A generation, or, after the last, what was found on the final tokens."""
        if super().remaining(state, problem):
            return super().next_round(state, problem, evaluator, rng)
        import numpy as np

        from evopress.search.evaluation import PARENT, TraceRow
        from evopress.search.selection import State

        minibatch = evaluator.draw(self.final_tokens, np.random.Generator(np.random.PCG64(0)))  # of all sizes and seeds
        (found,) = evaluator.evaluate(state.population[:1], minibatch)
        generation = state.generation + 1
        levels = tuple(state.parent.tolist())
        row = TraceRow(generation, 0, PARENT, minibatch, found.fitness, found.by_sequence, accepted=True, levels=levels)
        return State(generation, state.population, state.known), [row]

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Sizes must be given."""
        yield from super().problems(where, method)
        if not self.sizes_wanted():
            yield f"{where}: has no sizes: give sizes, as in [55 MB, 65 MB, 75 MB], in place of target"

    def remaining(self, state: "State", problem: "SearchProblem") -> int:
        """Generations that are left, and the final evaluation."""
        return super().remaining(state, problem) + 1

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """Those of the evolution, and the final ones."""
        return {**super().tokens_asked(problem), "final_tokens": self.final_tokens}

    def sentence(self) -> str:
        """End of a sentence on levels."""
        return f"{super().sentence()}, as one of several sizes"

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        ends = {"from": self.smallest, "to": self.largest, "points": self.points}
        given = [name for name, value in ends.items() if value is not None]
        if self.sizes is not None and given:
            raise ValueError(f"sizes and {' and '.join(given)} are both given: sizes names all of them; remove one")
        if given and len(given) < len(ends):
            missing = " and ".join(name for name in ends if name not in given)
            raise ValueError(f"{' and '.join(given)} without {missing}: give all of from, to and points, or sizes")
        if "target" in self.model_fields_set:
            if given or self.sizes is not None:
                raise ValueError(
                    "target and sizes are both given: a front has sizes in place of a target; remove target"
                )
            if not isinstance(self.target, SizeTarget):
                raise ValueError("target: a front is of sizes of the file; give sizes, or from, to and points")
            return self
        if not given and not self.sizes:
            raise ValueError("has no sizes: give sizes, as in [55 MB, 65 MB, 75 MB], or from, to and points")
        for lower, upper in pairwise(self.sizes_wanted()):
            if lower == upper:
                raise ValueError(f"sizes: {megabytes(lower)} comes twice; keep one of them, or ask for fewer points")
            if lower > upper:
                raise ValueError(
                    f"sizes: {megabytes(upper)} comes after {megabytes(lower)}; name them in ascending order"
                )
        return self
