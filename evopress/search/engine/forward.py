"""Run many candidates through the model together, block by block, computing shared prefixes once.

A *state* is the hidden states after some blocks. Two candidates with the same levels so far are in the same state, so
it is computed once, however many candidates pass through it. Processes that share the work are given candidates that
share prefixes, or sequences.
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
            after += blocks.run_states(block, levels, inside, inputs, max(1, run_tokens // length))
    return after


def _last_use(states: list[Tensor | None], state: int, uses: NDArray[np.int64]) -> Tensor:
    """Take a state, and drop it from ``states`` if nothing else will use it."""
    taken = _present(states[state])
    uses[state] -= 1
    if not uses[state]:
        states[state] = None
    return taken


def _present(state: Tensor | None) -> Tensor:
    assert state is not None, "a state was dropped before its last use"
    return state


@dataclass(frozen=True)
class Share:
    """What one process judges: these candidates on these sequences."""

    candidates: slice
    sequences: slice


def share_out(
    candidates: NDArray[np.int16], block_of: NDArray[np.int64], blocks: int, head: float, lengths: Sequence[int], n: int
) -> list[Share]:
    """Divide the work among ``n`` processes: by candidates or by sequences, whichever leaves the busiest less to do.

    Divided by candidates, neighbours in lexicographic order, which share the longest prefixes, stay together; what
    two parts have in common is computed in both. Divided by sequences, nothing is computed twice, but there may be
    fewer sequences than processes.

    Args:
        candidates: [C, units], distinct, in lexicographic order.
        block_of: [units] block of each unit, rising.
        blocks: blocks of the model.
        head: work of the head, as a multiple of that of one block.
        lengths: tokens of each sequence.
        n: processes.
    """
    new = new_blocks(candidates, block_of, blocks)
    costs = run_costs(new, blocks, head)
    parts = partition(costs, n)
    cuts = np.searchsorted(np.cumsum(lengths), np.arange(1, n) * sum(lengths) / n + lengths[0] / 2).tolist()
    pieces = [slice(start, stop) for start, stop in pairwise([0, *cuts, len(lengths)])]
    by_candidates = max(costs[part.start, part.stop] for part in parts) * sum(lengths)
    by_sequences = costs[0, -1] * max(sum(lengths[piece]) for piece in pieces)
    if by_candidates <= by_sequences:
        return [Share(part, slice(0, len(lengths))) for part in parts]
    return [Share(slice(0, len(new)), piece) for piece in pieces]


def new_blocks(candidates: NDArray[np.int16], block_of: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
    """Blocks that each candidate must run, given what the one before it has run, [C]; the first must run all."""
    differs = candidates[1:] != candidates[:-1]
    first = block_of[differs.argmax(axis=1)]
    return np.array([blocks, *(blocks - first)], dtype=np.int64)


def run_costs(new: NDArray[np.int64], blocks: int, head: float) -> NDArray[np.float64]:
    """Work per token of the candidates from a to b, [C + 1, C + 1] by a and b; 0 for none.

    Their first runs every block, and the dense model's logits are made once.
    """
    count = len(new)
    bounds = np.arange(count + 1)
    run = np.cumsum([0, *new])  # run[b] - run[a + 1]: blocks of the candidates from a to b but the first
    costs = blocks + run - run[np.minimum(bounds + 1, count)][:, None] + head * (bounds - bounds[:, None] + 1)
    return np.where(bounds > bounds[:, None], costs, 0.0)


def partition(costs: NDArray[np.float64], n: int) -> list[slice]:
    """Cut candidates into ``n`` runs (the last may be empty) of which the dearest of `run_costs` is least."""
    count = len(costs) - 1
    best, cut = costs[0], []  # best[b]: dearest of the runs that hold the first b candidates
    for _ in range(n - 1):
        dearest = np.maximum(best[:, None], np.where(np.tri(count + 1, k=-1, dtype=bool), np.inf, costs))
        cut.append(dearest.argmin(axis=0))
        best = dearest.min(axis=0)
    ends = [count]
    for starts in reversed(cut):
        ends.append(int(starts[ends[-1]]))
    return [slice(start, stop) for start, stop in pairwise([0, *reversed(ends)])]
