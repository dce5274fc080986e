"""Evolutionary search, from artifacts to the chosen candidate."""

from collections.abc import Sequence

from evopress.artifacts.tables import CONFIGURATION, read_table
from evopress.search.context import Context, Found
from evopress.search.engine.evaluator import require_tokens
from evopress.search.engine.objectives import Fitness
from evopress.search.evolution.earlier import earlier_candidate
from evopress.search.evolution.generations import first_state, next_generation
from evopress.search.evolution.initial import even_candidate
from evopress.search.evolution.selection import Step
from evopress.search.rounds import Rounds, search_by_model
from evopress.search.settings import EvolutionSettings
from evopress.search.space import Candidate, Space


def evolution(context: Context[EvolutionSettings]) -> Found | None:
    """Evolve a configuration.

    Raises:
        ConfigError: the text or the memory is too little.
        ArtifactError: tokens or variants are missing, damaged or of another model.
        SearchError: no candidate has a fitness.
    """
    settings = context.settings
    fitness = Fitness(settings.fitness, settings.top_k)
    found = [read_table(context.run.configuration(name), CONFIGURATION) for name in settings.start_from]
    rounds = generations(context.space, settings, [earlier_candidate(context.space, table) for table in found])
    return search_by_model(context, rounds, fitness, tokens_asked(settings, context.space))


def generations(space: Space, settings: EvolutionSettings, earlier: Sequence[Candidate] = ()) -> Rounds:
    """The evolution, a generation a round; ``earlier`` candidates, [units] each, are among its starts."""
    steps = [Step(kept, tokens) for kept, tokens in zip(settings.survivors, settings.tokens, strict=True)]
    alone = settings.sensitivity_tokens if settings.start == "sensitivity" else None
    starts, tokens = settings.initial_candidates, settings.initial_tokens
    return Rounds(
        start=lambda evaluator, rng: first_state(
            space, starts, tokens, evaluator, rng, alone, settings.population, earlier
        ),
        advance=lambda state, evaluator, rng: next_generation(
            state, space, settings.offspring, steps, evaluator, rng, settings.switches
        ),
        left=lambda state: settings.generations - state.generation,
        seed=settings.seed,
        unit="generations",
    )


def check_tokens(settings: EvolutionSettings, space: Space, available: int, where: str) -> None:
    """Refuse steps that ask for more tokens than the search text has.

    Raises:
        ConfigError: with the setting and both numbers.
    """
    require_tokens(tokens_asked(settings, space), available, where)


def tokens_asked(settings: EvolutionSettings, space: Space) -> dict[str, int]:
    """Tokens of each judgement, by setting; ``initial_tokens`` matters only where there are starts to compare."""
    asked = {f"tokens[{step}]": tokens for step, tokens in enumerate(settings.tokens)}
    if settings.start == "sensitivity":
        asked["sensitivity_tokens"] = settings.sensitivity_tokens
    if settings.start == "sensitivity" or settings.start_from or not space.fits(even_candidate(space)):
        asked["initial_tokens"] = settings.initial_tokens
    return asked
