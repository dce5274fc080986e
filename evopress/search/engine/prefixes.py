"""Bookkeeping of what candidates share: index arithmetic only, no tensor of the model.

A *state* is the hidden states after some blocks. Two candidates with the same levels so far are in the same state, so
it is computed once, however many candidates pass through it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


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
