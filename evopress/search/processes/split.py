"""Sharing the work of a minibatch among processes: index arithmetic only, no tensor of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


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
