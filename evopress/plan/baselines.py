"""What the strategies beside evolution judge, and what that takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.config.data import TextSettings
from evopress.plan.judging import dense_layers, memory_plan, minibatch, passes_of, peak_memory
from evopress.plan.shape import ModelShape
from evopress.plan.space import kept_share, planned_space
from evopress.search.engine.prefixes import plan_block
from evopress.search.settings import BruteSettings, DpSettings, GreedySettings, ScoresSettings
from evopress.search.space import Space, Unit
from evopress.search.strategies import brute, dp, greedy, scores

BaselineSettings = GreedySettings | DpSettings | ScoresSettings | BruteSettings


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
    rule = settings.group_rule if isinstance(settings, GreedySettings | DpSettings) else "none"
    space = planned_space(variants, settings.target, rule, where)
    judged, ran = judgements(space, settings, shape.blocks, where), kept_share(space, shape.blocks)
    memory, length = memory_plan(shape, memory_gb, device), text.sequence_length
    read = float(text.tokens or math.nan) if judged.teacher else 0.0
    tokens = judged.candidates * settings.tokens
    arithmetic = ran.arithmetic if isinstance(settings, BruteSettings) else 1.0  # others judge nearly whole models
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


def judgements(space: Space, settings: BaselineSettings, blocks: int, where: str) -> Judged:
    """Candidates that a strategy judges; those of a greedy descent are the most that there can be.

    Raises:
        ConfigError: there are more than brute force may try.
    """
    if isinstance(settings, BruteSettings):
        brute.require_few(space, settings.max_candidates, where)
        count = brute.choices(space)
        return Judged(count, min(count, brute.PART), _all_choices(space), settings.fitness != "perplexity")
    if isinstance(settings, GreedySettings):
        steps = np.vstack([space.top, space.top - np.eye(len(space.units), dtype=np.int16)])
        rounds = greedy.rounds_left(space, space.top, settings.per_round)
        share = shared_work(space, steps.clip(min=0), blocks, len(steps))
        return Judged(rounds * len(steps), len(steps), share, settings.fitness != "perplexity")
    if isinstance(settings, DpSettings):
        alone = dp.one_alone(space)
        return Judged(len(alone), dp.PART, shared_work(space, alone, blocks, dp.PART), head=False)
    if not settings.judges():
        return Judged(1, 1, 1.0, teacher=False, head=False)
    removed = np.stack([scores.without(space, [block]) for block in scores.whole_blocks(space)])
    share = shared_work(space, removed, blocks, scores.PART)
    return Judged(len(removed), scores.PART, share, settings.score == "kl")


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


def _all_choices(space: Space) -> float:
    """Share of block work of all ways to drop so many units: one state for each choice made so far."""
    units, dropped = len(space.units), brute.dropped_units(space)
    states = [
        sum(math.comb(seen, gone) for gone in range(min(seen, dropped) + 1) if dropped - gone <= units - seen)
        for seen in range(1, units + 1)
    ]
    return sum(states) / units / math.comb(units, dropped)
