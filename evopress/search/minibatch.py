"""Random minibatches of the search text."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Minibatch:
    """Rows of the search tokens and how much of each is run. Equal minibatches hold the very same tokens."""

    sequences: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    def segments(self) -> list[tuple[int, int, int]]:
        """Runs of sequences of equal length, as (first position, end, length)."""
        cut = len(self.lengths) - (self.lengths[-1] != self.lengths[0])
        whole = [(0, cut, self.lengths[0])]
        return whole + ([(cut, len(self.lengths), self.lengths[-1])] if cut < len(self.lengths) else [])


def draw_minibatch(
    tokens: int, sequences: int, length: int, rng: np.random.Generator, longest: int | None = None
) -> Minibatch:
    """Draw ``tokens`` tokens: random whole sequences without repetition, the last of which is cut to fit.

    Args:
        tokens: how many, at most sequences x length.
        sequences: number of sequences to draw from.
        length: tokens of each.
        rng: consumed.
        longest: of each sequence only its first so many tokens are taken, or the fewest for which the text suffices.
    """
    if longest is not None:
        length = min(length, max(longest, -(-tokens // sequences)))
    count = -(-tokens // length)
    chosen = rng.choice(sequences, size=count, replace=False).tolist()
    last = tokens - (count - 1) * length
    # Whole sequences are sorted, so that drawing the whole text twice gives equal minibatches.
    rows = sorted(chosen) if last == length else [*sorted(chosen[:-1]), chosen[-1]]
    return Minibatch(tuple(rows), (length,) * (count - 1) + (last,))
