"""The record of every judgement that a search made."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from evopress.artifacts.tables import TRACE
from evopress.search.minibatch import Minibatch

PARENT = -1
"""Candidate number of the parent; further parents of a population follow downwards."""


@dataclass(frozen=True)
class TraceRow:
    """One candidate judged in one selection step."""

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
    """Judged on the very same tokens before, so nothing was run."""

    def record(self) -> dict:
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


def trace_table(records: Sequence[dict]) -> pd.DataFrame:
    """Table with the TRACE schema."""
    return pd.DataFrame(list(records), columns=TRACE.names)
