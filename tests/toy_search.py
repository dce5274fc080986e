"""Rounds of strategies on toy spaces and evaluators: no model, no bits."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from evopress.compression.families import BITS
from evopress.search.candidates import make_offspring
from evopress.search.evaluation import Evaluator, SearchResult
from evopress.search.problem import SearchProblem
from evopress.search.resume import ResumeFolder
from evopress.search.rounds import RoundStrategy, run_rounds
from evopress.search.selection import Round, State, Step, select_next
from evopress.search.sensitivity import Effects, single_effects
from evopress.search.space import Candidate, Space
from evopress.search.strategies.evolution import Evolution


def problem_of(space: Space, earlier: Iterable[Candidate] = (), effects: Effects | None = None) -> SearchProblem:
    found = dict(zip("abcdef", earlier, strict=False))
    return SearchProblem(space, BITS, "v", "searches.x", earlier=found, effects=effects)


def first_state(
    space: Space,
    candidates: int,
    tokens: int,
    evaluator: Evaluator,
    rng: np.random.Generator,
    sensitivity_tokens: int | None = None,
    population: int = 1,
    earlier: Sequence[Candidate] = (),
) -> Round:
    """Where an evolution starts."""
    start = {} if sensitivity_tokens is None else {"start": "sensitivity", "sensitivity_tokens": sensitivity_tokens}
    settings = Evolution(
        variants="v",
        target=1,
        initial_candidates=candidates,
        initial_tokens=tokens,
        population=population,
        survivors=(population,),
        tokens=(tokens,),
        start_from=("a",) if earlier else (),
        **start,
    )
    effects = None if sensitivity_tokens is None else single_effects(space, sensitivity_tokens, evaluator, rng)
    return settings.first_round(problem_of(space, earlier, effects), evaluator, rng)


def next_generation(
    state: State,
    space: Space,
    offspring: int,
    steps: Sequence[Step],
    evaluator: Evaluator,
    rng: np.random.Generator,
    switches: int | None = None,
) -> Round:
    """A generation with any steps."""
    children = make_offspring(state.population, space, offspring, rng, switches)
    return select_next(state, children, steps, evaluator, rng)


def run(strategy: RoundStrategy, space: Space, evaluator: Evaluator, folder: Path, **options: object) -> SearchResult:
    """All rounds, or those that are left."""
    check: Callable[[], None] = options.get("check", lambda: None)  # type: ignore[assignment]
    return run_rounds(strategy, problem_of(space), evaluator, ResumeFolder(folder, "digest"), "x", check)
