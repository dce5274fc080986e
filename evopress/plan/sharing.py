"""How much of the candidates' way through the model is shared, from how the search mutates.

Offspring of one parent follow it up to the first block that a level switch touched. With f the share of a group's
units that lie behind a block, a switch (one unit raised, one other of its group lowered) leaves all blocks up to that
one alone with probability f^2, nearly, and touches them once with 2 f (1 - f). An offspring has one to three switches
with probabilities 5/9, 3/9, 1/9. Of n offspring, the states that exist after a block are then

    the parent's, if any of them still follows it, or if the parent is judged as well,
    one for each distinct single change made so far: of 2 m possible ones (m units, raised or lowered), n offspring
        hit 2 m (1 - (1 - p / 2 m)^n), where p is the probability of exactly one change so far,
    one for each offspring with more changes: they are taken to differ.

With many blocks and few offspring this comes to a share of 1 - (5/9) / 3 - (3/9) / 5 - (1/9) / 7 = 0.73 of the work
of one candidate at a time: nearly half of all offspring have left the parent a fifth of the way in.

What is left out: levels at the end of their range, switches that undo each other, the kinship that selection leaves
among survivors. Where layers of unlike size trade (group rule `none`), a switch touches more than two units, so less is
shared than this says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

SWITCHES = {1: 5 / 9, 2: 3 / 9, 3: 1 / 9}
"""Probability of each number of switches: min(U(1,3), U(1,3))."""
CHANGES = 2 * sum(count * probability for count, probability in SWITCHES.items())
"""Units whose level differs from the parent's, on average: two for each switch."""


@dataclass(frozen=True)
class Sharing:
    """Units by block and group: who may change, where."""

    units: NDArray[np.int64]
    """[blocks, groups]."""

    @classmethod
    def of(cls, blocks: Sequence[int], groups: Sequence[str], count: int) -> "Sharing":
        """Count units, given the block and the group of each, over ``count`` blocks."""
        names = list(dict.fromkeys(groups))
        units = np.zeros((count, len(names)), dtype=np.int64)
        np.add.at(units, (list(blocks), [names.index(group) for group in groups]), 1)
        return cls(units)

    def states(self, offspring: int, *, parent: bool) -> NDArray[np.float64]:
        """Expected number of distinct hidden states after each block, [blocks].

        Args:
            offspring: number of mutants that are judged together.
            parent: whether the parent is judged with them.
        """
        size = self.units.sum(axis=0)
        weight = size / max(1, size.sum())  # a switch raises a random unit, which decides its group
        pairs = np.maximum(1, size * (size - 1))
        return np.array(
            [_states(touched, size - touched, pairs, weight, offspring, parent) for touched in accumulate(self.units)]
        )

    def share(self, offspring: int, *, parent: bool) -> float:
        """Expected block work, as a share of that of one candidate at a time."""
        return float(self.states(offspring, parent=parent).mean()) / (offspring + parent)

    def changed(self, offspring: int) -> float:
        """Expected number of (unit, level) pairs beside the parent's that ``offspring`` mutants use."""
        cells = 2 * max(1, int(self.units.sum()))
        return cells * (1 - (1 - CHANGES / cells) ** offspring) if cells > CHANGES else float(cells)


@dataclass(frozen=True)
class Unrelated:
    """Candidates that are drawn from all over the space: after a few units, no two are alike."""

    levels: tuple[int, ...]
    """Number of levels of each unit."""

    def share(self, offspring: int, *, parent: bool) -> float:
        """Block work, as a share of that of one candidate at a time."""
        return 1.0

    def changed(self, offspring: int) -> float:
        """Expected number of (unit, level) pairs beside one candidate's that ``offspring`` others use."""
        return sum((levels - 1) * (1 - (1 - 1 / levels) ** offspring) for levels in self.levels)


def _states(
    before: NDArray[np.int64],
    behind: NDArray[np.int64],
    pairs: NDArray[np.int64],
    weight: NDArray[np.float64],
    offspring: int,
    parent: bool,
) -> float:
    """Expected states after one block, with ``before`` units [groups] up to it and ``behind`` after it."""
    untouched = float((weight * behind * np.maximum(0, behind - 1) / pairs).sum())
    once = weight * 2 * before * behind / pairs
    none = sum(probability * untouched**count for count, probability in SWITCHES.items())
    single = sum(probability * count * once * untouched ** (count - 1) for count, probability in SWITCHES.items())
    cells = np.maximum(1, 2 * before)
    distinct = float((cells * (1 - (1 - np.minimum(1, single / cells)) ** offspring)).sum())
    several = offspring * max(0.0, 1 - none - float(np.sum(single)))
    following = 1.0 if parent else 1 - (1 - none) ** offspring
    return following + distinct + several
