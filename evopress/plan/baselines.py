"""What the strategies beside evolution judge, and what that takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.compression.base import Unit
from evopress.config.data import TextSettings
from evopress.plan.judging import dense_layers, memory_plan, minibatch, passes_of, peak_memory
from evopress.plan.shape import ModelShape
from evopress.plan.space import kept_share, planned_problem
from evopress.search.engine.forward import plan_block
from evopress.search.problem import SearchProblem
from evopress.search.space import Space
from evopress.search.strategies.brute import BruteForce
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.scores import BlockScores

BaselineSettings = Greedy | DynamicProgramming | BlockScores | BruteForce


@dataclass(frozen=True)
class Judged:
    """Candidates that a strategy judges, all on equally many tokens."""

    candidates: int
    together: int
    """At once."""
    share: float
    """Expected block work, as a share of that of one candidate at a time."""
    teacher: bool = True
    """Whether the dense model is run on the search text first."""
    head: bool = True
    """Whether logits are made."""


@dataclass(frozen=True)
class BaselineWork:
    """Work of a whole search; memory in bytes."""

    candidate_tokens: int
    flops: float
    memory_bytes: float


def baseline_work(
    shape: ModelShape,
    variants: pd.DataFrame,
    settings: BaselineSettings,
    text: TextSettings,
    memory_gb: float,
    device: str,
    where: str,
) -> BaselineWork:
    """Work out a search that judges candidates before it runs (arguments as `planning.search.search_work`).

    Raises:
        ConfigError: the target and the levels do not allow the search.
    """
    problem = planned_problem(variants, settings.target, settings.grouping(), where)
    space = problem.space
    judged, ran = judgements(problem, settings, shape.blocks), kept_share(space, shape.blocks)
    memory, length = memory_plan(shape, memory_gb, device), text.sequence_length
    read = float(text.tokens or math.nan) if judged.teacher else 0.0
    tokens = judged.candidates * settings.tokens
    arithmetic = ran.arithmetic if isinstance(settings, BruteForce) else 1.0  # others judge nearly whole models
    block_tokens = shape.blocks * (tokens * judged.share * arithmetic + read)
    head_tokens = tokens + judged.teacher * settings.tokens if judged.head else 0
    hidden = passes_of(shape, minibatch(settings.tokens, length), min(judged.together, judged.candidates), memory)[1]
    levels = sum(unit.parameters * len(unit.levels) for unit in space.units if not unit.modules) * shape.itemsize
    weights = sum(dense_layers(shape, variants, memory)[0]) + levels
    return BaselineWork(
        candidate_tokens=tokens,
        flops=block_tokens * shape.block_flops(length) + head_tokens * shape.head_flops,
        memory_bytes=peak_memory(shape, memory, hidden, weights, length) + read * shape.hidden_size * shape.itemsize,
    )


def judgements(problem: SearchProblem, settings: BaselineSettings, blocks: int) -> Judged:
    """Candidates that a strategy will have evaluated; those of a greedy descent are the most that there can be.

    Raises:
        ConfigError: there are more than brute force may try.
    """
    requests = settings.evaluations(problem, np.random.Generator(np.random.PCG64(0)))
    fitness = settings.minimizes()
    if not requests or fitness is None:
        return Judged(1, 1, 1.0, teacher=False, head=False)
    counts = [len(request.candidates) * request.times for request in requests]
    together = max(len(request.candidates) for request in requests)
    work = [shared_work(problem.space, request.candidates, blocks, together) for request in requests]
    share = float(np.average(work, weights=counts))
    return Judged(sum(counts), together, share, fitness.name != "perplexity", fitness.name != "hidden_error")


def shared_work(space: Space, candidates: NDArray[np.int16], blocks: int, part: int) -> float:
    """Block work of ``candidates`` [C, units], ``part`` of them at a time, as a share of ``blocks`` for each."""
    runs = 0
    units_of = [[index for index, unit in enumerate(space.units) if block in unit.blocks] for block in range(blocks)]
    for start in range(0, len(candidates), part):
        together = candidates[start : start + part]
        state_of = np.zeros(len(together), dtype=np.int64)
        for block, members in enumerate(units_of):
            plan = plan_block(state_of, together[:, members])
            state_of = plan.state_of
            runs += sum(
                len(states)
                for levels, states in plan.groups()
                if not _gone([space.units[i] for i in members], block, levels)
            )
    return runs / (len(candidates) * blocks)


def _gone(units: Sequence[Unit], block: int, levels: Sequence[int]) -> bool:
    """Whether these levels drop both modules of a block."""
    chosen = zip(units, levels, strict=True)
    kinds = {kind for unit, level in chosen if level == 0 for other, kind in unit.modules if other == block}
    return len(kinds) == 2
