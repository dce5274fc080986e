"""Block scores: whole blocks are dropped, those that matter least when each is looked at alone.

How much a block matters is read from what it does to hidden states (`block_scores`), or from what its removal alone
does to the model: the perplexity without it (Shortened Llama, arXiv 2402.02834), or the divergence from the dense
model. The window score drops consecutive blocks, those which together change hidden states least.
"""

import time

import numpy as np
import torch
from numpy.typing import NDArray

from evopress.models.blockwise import BlockwiseModel
from evopress.search.context import Context, Found
from evopress.search.engine.block_scores import SCORES, block_scores
from evopress.search.engine.evaluator import require_tokens, search_text
from evopress.search.engine.memory import plan_memory
from evopress.search.engine.objectives import Fitness
from evopress.search.enumeration import enumeration, fitness_of_each
from evopress.search.minibatch import draw_minibatch
from evopress.search.processes.termination import stop_on_sigterm
from evopress.search.record.effort import Effort
from evopress.search.rounds import search_by_model
from evopress.search.settings import ScoresSettings
from evopress.search.space import Candidate, Space
from evopress.util.device import resolve_device
from evopress.util.errors import ConfigError

PART = 16
"""Blocks that are judged between two moments at which a search may be killed without loss."""


def scores(context: Context[ScoresSettings]) -> Found | None:
    """Drop the blocks of least score.

    Raises:
        ConfigError: fewer blocks may go as a whole than are asked, or the text or the memory is too little.
        ArtifactError: tokens or variants are missing, damaged or of another model.
        SearchError: a score is no number.
    """
    settings, space = context.settings, context.space
    whole, count = whole_blocks(space), int(settings.target)
    if len(whole) < count:
        raise ConfigError(
            f"{context.where}.target: {count} whole blocks are to be dropped, but only {len(whole)} may be; lower it, "
            f"or exclude fewer modules"
        )
    if settings.judges():
        alone = np.stack([without(space, [block]) for block in whole])
        rounds = enumeration(alone, PART, settings.tokens, settings.seed)
        found = search_by_model(context, rounds, Fitness(settings.score), settings.tokens_asked())
        if found is None:
            return None
        values = dict(zip(whole, fitness_of_each(found.records).tolist(), strict=True))
        return Found(without(space, least(values, count)), found.records, found.effort)
    started = time.monotonic()
    measured = _measured(context, count)
    if settings.score == "window_cosine":
        chosen = least_window(measured, whole, count, f"{context.where}.target")
    else:
        chosen = least({block: float(measured[block]) for block in whole}, count)
    return Found(without(space, chosen), effort=Effort(settings.tokens, time.monotonic() - started))


def _measured(context: Context[ScoresSettings], window: int) -> NDArray[np.float64]:
    """Score of each block, or of each window of ``window`` blocks by its first."""
    settings, text = context.settings, search_text(context.run)
    require_tokens(settings.tokens_asked(), text.numel(), context.where)
    rng = np.random.Generator(np.random.PCG64(settings.seed))
    drawn = draw_minibatch(settings.tokens, len(text), text.shape[1], rng)
    model = BlockwiseModel.from_folder(
        context.run.model,
        resolve_device(context.compute.device),
        resident=False,
        quick=True,
        trust_remote_code=context.trust_remote_code,
    )
    run_tokens = plan_memory(context.compute.memory_gb, model, text.shape[1]).run_tokens
    blocks = window if settings.score == "window_cosine" else 1
    total = 0.0
    values = np.zeros(len(model.blocks) - blocks + 1)
    with stop_on_sigterm() as check:
        for start, end, length in drawn.segments():
            tokens = text[torch.tensor(drawn.sequences[start:end])][:, :length]
            values += block_scores(model, tokens, SCORES[settings.score], blocks, run_tokens, check) * tokens.numel()
            total += tokens.numel()
    return values / total


def whole_blocks(space: Space) -> list[int]:
    """Blocks of which both modules may be dropped."""
    kinds: dict[int, set[str]] = {}
    for unit in space.units:
        for block, kind in unit.modules:
            kinds.setdefault(block, set()).add(kind)
    return sorted(block for block, found in kinds.items() if len(found) == 2)


def without(space: Space, blocks: list[int]) -> Candidate:
    """Candidate that drops all modules of ``blocks``, and no other."""
    gone = [unit.modules and all(block in blocks for block, _ in unit.modules) for unit in space.units]
    return np.where(gone, 0, space.top).astype(np.int16)


def least(values: dict[int, float], count: int) -> list[int]:
    """The ``count`` blocks of least value; of equals the later ones, which disturb fewer blocks behind them."""
    return sorted(values, key=lambda block: (values[block], -block))[:count]


def least_window(values: NDArray[np.float64], whole: list[int], count: int, where: str) -> list[int]:
    """The ``count`` consecutive blocks of least value.

    Raises:
        ConfigError: so many consecutive blocks cannot all be dropped.
    """
    possible = {
        first: float(value) for first, value in enumerate(values) if set(range(first, first + count)) <= set(whole)
    }
    if not possible:
        raise ConfigError(f"{where}: there are no {count} consecutive blocks that may all be dropped; exclude fewer")
    first = least(possible, 1)[0]
    return list(range(first, first + count))
