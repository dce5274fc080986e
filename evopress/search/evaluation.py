"""What it is to evaluate candidates: the tokens, the result, who does it, and the record that a search leaves.

The search knows nothing else of models, tokens or bits.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evopress.artifacts.tables import EFFORT
from evopress.search.space import Candidate

PARENT = -1
"""Candidate number of the parent; further parents of a population follow downwards."""


@dataclass(frozen=True)
class Minibatch:
    """Rows of the search tokens, and how they are run. Equal minibatches hold the very same tokens, run alike."""

    sequences: tuple[int, ...]
    lengths: tuple[int, ...]
    """How much of each is run."""
    precise: bool = False
    """Run in float32 where others are run in 16 bits, whose rounding hides what a single unit does."""

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


@dataclass(frozen=True)
class Evaluation:
    """Fitness of one candidate on one minibatch; lower is better."""

    fitness: float
    """Mean over tokens."""
    by_sequence: tuple[float, ...]
    """Mean over the tokens of each sequence."""
    hidden_error: float = math.nan
    """Squared error of the final hidden states relative to the dense model's, mean over tokens; NaN if not known."""


class Evaluator(Protocol):
    """Evaluates candidates."""

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Draw exactly ``tokens`` tokens, from sequences cut to ``longest`` (`draw_minibatch`)."""
        ...

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """Evaluate each of ``candidates`` [C, units] on the same minibatch."""
        ...


@dataclass
class CountingEvaluator:
    """An evaluator that counts what it evaluates."""

    inner: Evaluator
    tokens: int = 0
    """Candidates x tokens."""

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Draw exactly ``tokens`` tokens."""
        return self.inner.draw(tokens, rng, longest)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """Evaluate each of ``candidates`` [C, units] on the same minibatch."""
        self.tokens += len(candidates) * minibatch.tokens
        return self.inner.evaluate(candidates, minibatch)


@dataclass(frozen=True)
class TraceRow:
    """One candidate evaluated in one selection step."""

    generation: int
    step: int
    candidate: int
    minibatch: Minibatch
    fitness: float
    fitness_by_sequence: tuple[float, ...]
    accepted: bool
    """Became, or stayed, a parent."""
    levels: tuple[int, ...] = ()
    """The candidate; not a column of the table."""
    remembered: bool = False
    """Evaluated on the very same tokens before, so nothing was run."""

    @property
    def evaluation(self) -> Evaluation:
        """What was found."""
        return Evaluation(self.fitness, self.fitness_by_sequence)

    def record(self) -> dict[str, Any]:
        """Columns of the TRACE schema, as JSON values."""
        return {
            "generation": self.generation,
            "step": self.step,
            "candidate": self.candidate,
            "tokens": 0 if self.remembered else self.minibatch.tokens,
            "fitness": self.fitness,
            "fitness_by_sequence": list(self.fitness_by_sequence),
            "sequences": list(self.minibatch.sequences),
            "accepted": bool(self.accepted),
        }


@dataclass(frozen=True)
class Effort:
    """Sums over a search, killed parts included as far as they were recorded."""

    tokens: int = 0
    """Candidates x tokens that were evaluated."""
    seconds: float = 0.0
    """Wall time."""

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.tokens + other.tokens, self.seconds + other.seconds)


@dataclass(frozen=True)
class Incumbent:
    """The best candidate after a generation."""

    generation: int
    candidate: Candidate
    effort: Effort
    """Spent by then."""


@dataclass(frozen=True)
class SearchResult:
    """The chosen candidate, and how it was found."""

    candidate: Candidate
    records: list[dict[str, Any]] = field(default_factory=list)
    """Evaluations, as records of the TRACE schema."""
    effort: Effort = field(default_factory=Effort)
    progress: list[dict[str, Any]] = field(default_factory=list)
    """The best so far on a fixed part of the text, as records of the PROGRESS schema."""


def effort_table(effort: Effort) -> pd.DataFrame:
    """Table with the EFFORT schema: one row."""
    return pd.DataFrame([asdict(effort)], columns=EFFORT.names)


def read_effort(table: pd.DataFrame) -> Effort:
    """What `effort_table` holds."""
    return Effort(int(table["tokens"].iloc[0]), float(table["seconds"].iloc[0]))
