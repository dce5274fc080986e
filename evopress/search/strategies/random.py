"""Random search: as many candidates as evolution judges, on as many tokens, but from all over the space.

Each generation draws new ones; the best so far is admitted to the last selection step, as evolution's parent is.
"""

import numpy as np

from evopress.search.context import Context, Found
from evopress.search.engine.objectives import Fitness
from evopress.search.evolution.generations import State, select_next
from evopress.search.evolution.sampling import random_candidate, random_candidates
from evopress.search.evolution.selection import Evaluator, Step
from evopress.search.rounds import Round, Rounds, search_by_model
from evopress.search.settings import RandomSettings
from evopress.search.space import Space


def random_search(context: Context[RandomSettings]) -> Found | None:
    """Keep the best of random candidates.

    Raises:
        ConfigError: the text or the memory is too little.
        ArtifactError: tokens or variants are missing, damaged or of another model.
        SearchError: no candidate has a fitness.
    """
    settings = context.settings
    asked = {f"tokens[{step}]": tokens for step, tokens in enumerate(settings.tokens)}
    fitness = Fitness(settings.fitness, settings.top_k)
    return search_by_model(context, draws(context.space, settings), fitness, asked)


def draws(space: Space, settings: RandomSettings) -> Rounds:
    """The search, a generation a round."""
    steps = [Step(kept, tokens) for kept, tokens in zip(settings.survivors, settings.tokens, strict=True)]

    def start(evaluator: Evaluator, rng: np.random.Generator) -> Round:
        return State(0, random_candidate(space, rng)[None]), []

    def advance(state: State, evaluator: Evaluator, rng: np.random.Generator) -> Round:
        drawn = random_candidates(space, settings.offspring, rng)
        new = drawn[(drawn != state.parent).any(axis=1)]
        return select_next(state, new, steps, evaluator, rng)

    left = lambda state: settings.generations - state.generation  # noqa: E731
    return Rounds(start, advance, left, settings.seed, "generations")
