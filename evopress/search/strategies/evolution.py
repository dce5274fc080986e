"""Evolutionary search, from artifacts to the chosen candidate, with a resume file each generation."""

import time
from collections.abc import Callable

import numpy as np
import torch

from evopress.config.compute import ComputeSettings
from evopress.config.search import EvolutionSettings
from evopress.errors import ConfigError
from evopress.models.blockwise import BlockwiseModel
from evopress.models.propagation import final_hidden
from evopress.progress import log, progress
from evopress.search.counters import Counters
from evopress.search.evolution import State, first_state, next_generation
from evopress.search.fitness import ModelEvaluator
from evopress.search.forward import Check
from evopress.search.initial import even_candidate
from evopress.search.memory import plan_memory
from evopress.search.objectives import make_objective
from evopress.search.ranks import Ranks, in_parts
from evopress.search.resume import ResumeFolder
from evopress.search.selection import Evaluator, Step
from evopress.search.space import Candidate, Space
from evopress.search.trace import TraceRow
from evopress.search.weights import ReadAhead, Unpack, VariantBlocks


def check_tokens(settings: EvolutionSettings, space: Space, available: int, where: str) -> None:
    """Refuse steps that ask for more tokens than the search text has.

    ``initial_tokens`` matters only where there are starts to compare.

    Raises:
        ConfigError: with the setting and both numbers.
    """
    asked = {f"tokens[{step}]": tokens for step, tokens in enumerate(settings.tokens)}
    if settings.start == "sensitivity":
        asked["sensitivity_tokens"] = settings.sensitivity_tokens
    if settings.start == "sensitivity" or not space.fits(even_candidate(space)):
        asked["initial_tokens"] = settings.initial_tokens
    for name, tokens in asked.items():
        if tokens > available:
            raise ConfigError(
                f"{where}.{name}: asks for {tokens} tokens, but the search text has {available}; lower it, or raise "
                f"data.search.tokens"
            )


def model_evaluator(
    model: BlockwiseModel,
    space: Space,
    unpack: Unpack,
    tokens: torch.Tensor,
    settings: EvolutionSettings,
    compute: ComputeSettings,
    where: str,
    check: Check,
    *,
    read_ahead: ReadAhead | None = None,
    held: int = 0,
    ranks: Ranks | None = None,
) -> ModelEvaluator:
    """Run the dense model once and make the evaluator of all generations.

    Args:
        model: with no block loaded.
        space: its units' levels are what ``unpack`` is asked for.
        unpack: gives the weight of a layer at a level.
        tokens: [sequences, L] search tokens.
        settings: fitness.
        compute: memory.
        where: dotted path of the settings, for messages.
        check: raises if the search should stop.
        read_ahead: told what ``unpack`` will be asked for.
        held: bytes of the memory for weights that packed ones take.
        ranks: the processes that share the dense model's run; all call this together.

    Raises:
        ConfigError: the memory is too little, or more top tokens are asked than the vocabulary has.
    """
    if settings.fitness == "topk_kl" and settings.top_k > model.vocab_size:
        raise ConfigError(f"{where}.top_k: {settings.top_k} is more than the vocabulary has ({model.vocab_size})")
    objective = make_objective(settings.fitness, settings.top_k)
    memory, counters = plan_memory(compute.memory_gb, model, tokens.shape[1]), Counters()
    dense = None
    if objective.needs_teacher:
        dense = in_parts(
            ranks or Ranks(), tokens, lambda rows: final_hidden(model, rows, memory.run_tokens, "dense model", check)
        )
    blocks = VariantBlocks(model, space.units, unpack, memory.weights - held, counters, read_ahead)
    return ModelEvaluator(blocks, tokens, dense, objective, memory, counters, check)


def evolve(
    space: Space,
    settings: EvolutionSettings,
    make_evaluator: Callable[[], Evaluator],
    resume: ResumeFolder,
    name: str,
    check: Check,
) -> tuple[Candidate, list[dict]]:
    """Run all generations, or those that are left where a killed search stopped.

    Returns:
        The last parent, and the trace as records of the TRACE schema.
    """
    rng = np.random.Generator(np.random.PCG64(settings.seed))
    state = resume.load(rng)
    if state is not None:
        log.info("search %s: goes on after generation %d", name, state.generation)
    if state is None or state.generation < settings.generations:
        evaluator = make_evaluator()
        if state is None:
            state, rows = _start(space, settings, evaluator, rng)
            resume.save(state, rng, rows)
        state = _run_generations(state, space, settings, evaluator, rng, resume, name, check)
    return state.parent, resume.records(state.generation)


def _start(
    space: Space, settings: EvolutionSettings, evaluator: Evaluator, rng: np.random.Generator
) -> tuple[State, list[TraceRow]]:
    tokens = settings.sensitivity_tokens if settings.start == "sensitivity" else None
    return first_state(space, settings.initial_candidates, settings.initial_tokens, evaluator, rng, tokens)


def _run_generations(
    state: State,
    space: Space,
    settings: EvolutionSettings,
    evaluator: Evaluator,
    rng: np.random.Generator,
    resume: ResumeFolder,
    name: str,
    check: Check,
) -> State:
    steps = [Step(kept, tokens) for kept, tokens in zip(settings.survivors, settings.tokens, strict=True)]
    with progress(f"search {name}", settings.generations - state.generation, "generations") as bar:
        while state.generation < settings.generations:
            check()
            started = time.monotonic()
            state, rows = next_generation(state, space, settings.offspring, steps, evaluator, rng)
            resume.save(state, rng, rows)
            bar.advance(note=_note(rows, time.monotonic() - started))
    return state


def _note(rows: list[TraceRow], seconds: float) -> str:
    """Fitness of the new parent, and how fast tokens were judged."""
    best = next((row.fitness for row in rows if row.accepted), None)
    if best is None:
        return "no other candidate meets the budget"
    judged = sum(row.minibatch.tokens for row in rows)
    return f"fitness {best:.4g}, {judged / max(seconds, 1e-9):.3g} tokens/s"
