"""What a strategy spent: candidate tokens judged, and time."""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.artifacts.tables import EFFORT
from evopress.search.evolution.selection import Evaluator, Judgement
from evopress.search.minibatch import Minibatch


@dataclass(frozen=True)
class Effort:
    """Sums over a search, killed parts included as far as they were recorded."""

    tokens: int = 0
    """Candidates x tokens that were judged."""
    seconds: float = 0.0
    """Wall time."""

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.tokens + other.tokens, self.seconds + other.seconds)


@dataclass
class Counted:
    """An evaluator that counts what it judges."""

    inner: Evaluator
    tokens: int = 0

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Draw exactly ``tokens`` tokens."""
        return self.inner.draw(tokens, rng, longest)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Judgement]:
        """Judge each of ``candidates`` [C, units] on the same minibatch."""
        self.tokens += len(candidates) * minibatch.tokens
        return self.inner.evaluate(candidates, minibatch)


def read_effort(table: pd.DataFrame) -> Effort:
    """What `effort_table` holds."""
    return Effort(int(table["tokens"].iloc[0]), float(table["seconds"].iloc[0]))


def effort_table(effort: Effort) -> pd.DataFrame:
    """Table with the EFFORT schema: one row."""
    return pd.DataFrame([asdict(effort)], columns=EFFORT.names)
