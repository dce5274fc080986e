"""The evaluator of a search, in the arithmetic that each minibatch asks for.

Most candidates are evaluated in the type that the device is fast in. Where that has 16 bits, its rounding hides what a
single unit does, so minibatches of single effects are evaluated by a model that works in float32, on the same weights.
One model is open at a time, so that a search never holds both.
"""

import gc
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evopress.models.blockwise import BlockwiseModel
from evopress.search.base import Fitness
from evopress.search.engine.evaluator import ModelEvaluator, open_evaluator
from evopress.search.engine.forward import Check
from evopress.search.engine.weights import Counters
from evopress.search.evaluation import Evaluation, Minibatch, draw_minibatch
from evopress.search.problem import SearchContext, SearchProblem
from evopress.util.device import precise_dtype, working_dtype


class SearchEvaluator:
    """Evaluates candidates of a search; opens the model when the first ones are to be evaluated."""

    def __init__(
        self, context: SearchContext, problem: SearchProblem, tokens: Tensor, fitness: Fitness, check: Check
    ) -> None:
        """Open nothing yet; all processes of the search make the same calls.

        Args:
            context: the search, in this process.
            problem: is solved.
            tokens: [sequences, L] search tokens.
            fitness: what candidates are evaluated by.
            check: called between chunks; raises if the search should stop.
        """
        self.context, self.problem, self.tokens, self.fitness, self.check = context, problem, tokens, fitness, check
        self.counters = Counters()
        self._open: tuple[ModelEvaluator, Minibatch | None] | None = None
        """The evaluator that is open, and the precise minibatch that is all it has; None is the whole text."""

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Minibatch of exactly ``tokens`` tokens (`draw_minibatch`)."""
        sequences, length = self.tokens.shape
        return draw_minibatch(tokens, sequences, length, rng, longest)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """Evaluate each of ``candidates`` [C, units] on the same tokens.

        Raises:
            ConfigError: the memory is too little, or more top tokens are asked than the vocabulary has.
        """
        if not (minibatch.precise and self._rounds):
            return self._evaluator(None).evaluate(candidates, minibatch)
        rows = tuple(range(len(minibatch.sequences)))
        return self._evaluator(minibatch).evaluate(candidates, replace(minibatch, sequences=rows))

    @cached_property
    def _rounds(self) -> bool:
        """Whether the device works in a type whose rounding hides single effects."""
        stored = BlockwiseModel.stored_in(self.context.run.model, trust_remote_code=self.context.trust_remote_code)
        working = working_dtype(stored, self.context.device)
        return precise_dtype(working) != working

    def _evaluator(self, only: Minibatch | None) -> ModelEvaluator:
        """The evaluator of the whole text, or the precise one of ``only`` these tokens."""
        if self._open is None or self._open[1] != only:
            self._open = None
            gc.collect()  # the caches of a model and what fills them refer to each other
            context, where = self.context, self.problem.where
            evaluator = open_evaluator(
                context,
                self.problem,
                self.tokens,
                self.fitness,
                where,
                self.check,
                context.ranks,
                only=only,
                counters=self.counters,
            )
            self._open = evaluator, only
        return self._open[0]
