"""Run many candidates through the model together, block by block, computing shared prefixes once.

A *state* is the hidden states after some blocks. Two candidates with the same levels so far are in the same state, so
it is computed once, however many candidates pass through it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.models.blockwise import BlockInputs
from evopress.search.engine.weights import Counters, VariantBlocks

Check = Callable[[], None]
"""Called between pieces of work; raises if the search should stop."""


@dataclass(frozen=True)
class BlockPlan:
    """How the states before a block become those after it."""

    parents: NDArray[np.int64]
    """[new states] State before the block that each state after it comes from."""
    levels: NDArray[np.int16]
    """[new states, units of the block] Levels that lead to each; states with equal levels are adjacent."""
    state_of: NDArray[np.int64]
    """[candidates] State of each candidate after the block."""

    def groups(self) -> Iterator[tuple[tuple[int, ...], range]]:
        """Levels of the block, and the new states that they lead to."""
        changes = np.flatnonzero((self.levels[1:] != self.levels[:-1]).any(axis=1)) + 1
        bounds = [0, *changes.tolist(), len(self.levels)]
        for start, end in pairwise(bounds):
            yield tuple(self.levels[start].tolist()), range(start, end)


def plan_block(state_of: NDArray[np.int64], levels: NDArray[np.int16]) -> BlockPlan:
    """Plan one block.

    Args:
        state_of: [candidates] state of each candidate before the block.
        levels: [candidates, units of the block] levels of each candidate; may have no column.
    """
    keys = np.concatenate([levels.astype(np.int64), state_of[:, None]], axis=1)
    distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
    return BlockPlan(distinct[:, -1], distinct[:, :-1].astype(np.int16), inverse.reshape(-1))


@torch.inference_mode()
def advance(
    blocks: VariantBlocks,
    candidates: NDArray[np.int16],
    ids: Tensor,
    run_tokens: int,
    counters: Counters,
    check: Check,
    passed: Callable[[], None],
) -> list[Tensor]:
    """Final hidden states of each candidate on the same tokens.

    Args:
        blocks: runs a block at given levels.
        candidates: [C, units], distinct.
        ids: [S, L] tokens.
        run_tokens: tokens that pass a block at once (at least one sequence).
        counters: counts the work.
        check: called between runs.
        passed: called when all candidates have passed a block.

    Returns:
        C tensors [S, L, H].
    """
    states: list[Tensor | None]  # alone holds them, so that one is freed after its last use
    states, state_of, inputs = blocks.embed(candidates, ids)  # type: ignore[assignment]
    size = _present(states[0]).nbytes
    for block, units in enumerate(blocks.units_of):
        plan = plan_block(state_of, candidates[:, units])
        before = len(states)
        with blocks.passing(block, candidates):
            states = _pass_block(blocks, block, plan, states, inputs, run_tokens, check)
        state_of = plan.state_of
        counters.peak_state_bytes = max(counters.peak_state_bytes, (before + len(states)) * size)
        ran = np.zeros(len(states), dtype=bool)
        for levels, members in plan.groups():
            ran[members.start : members.stop] = not blocks.gone(block, levels)
        counters.block_tokens += int(ran.sum()) * ids.numel()
        counters.block_tokens_alone += int(ran[state_of].sum()) * ids.numel()
        passed()
    return [_present(states[state]) for state in state_of]


def _pass_block(
    blocks: VariantBlocks,
    block: int,
    plan: BlockPlan,
    states: list[Tensor | None],
    inputs: BlockInputs,
    run_tokens: int,
    check: Check,
) -> list[Tensor | None]:
    """States after a block; each state before it is dropped as soon as nothing needs it.

    States that a block without modules leaves unchanged are handed on, not run.
    """
    uses = np.bincount(plan.parents, minlength=len(states))
    after: list[Tensor | None] = []
    for levels, members in plan.groups():
        parents = plan.parents[members.start : members.stop].tolist()
        if blocks.gone(block, levels):
            after += [_last_use(states, parent, uses) for parent in parents]
            continue
        sequences, length = _present(states[parents[0]]).shape[:2]
        step = max(1, run_tokens // (sequences * length))
        for start in range(0, len(parents), step):
            check()
            batch = parents[start : start + step]
            inside = [_last_use(states, parent, uses) for parent in batch]
            after += _run_batch(blocks, block, levels, inside, inputs, max(1, run_tokens // length))
    return after


def _last_use(states: list[Tensor | None], state: int, uses: NDArray[np.int64]) -> Tensor:
    """Take a state, and drop it from ``states`` if nothing else will use it."""
    taken = _present(states[state])
    uses[state] -= 1
    if not uses[state]:
        states[state] = None
    return taken


def _run_batch(
    blocks: VariantBlocks,
    block: int,
    levels: Sequence[int],
    states: list[Tensor],
    inputs: BlockInputs,
    most_sequences: int,
) -> list[Tensor]:
    """Run several states as one batch, or one state in pieces where its sequences are too many for one run."""
    sequences = len(states[0])
    if len(states) > 1:
        # Copies: a view would keep the whole batch in memory as long as any one state of it lives.
        return [part.clone() for part in blocks.run(block, levels, torch.cat(states), inputs).split(sequences)]
    if sequences <= most_sequences:
        return [blocks.run(block, levels, states[0], inputs)]
    pieces = states[0].split(most_sequences)
    return [torch.cat([blocks.run(block, levels, piece, inputs) for piece in pieces])]


def _present(state: Tensor | None) -> Tensor:
    assert state is not None, "a state was dropped before its last use"
    return state
