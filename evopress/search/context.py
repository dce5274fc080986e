"""What a strategy is given, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from evopress.artifacts.paths import Run
from evopress.compression.store import VariantStore
from evopress.config.compute import ComputeSettings
from evopress.search.processes.ranks import Ranks
from evopress.search.record.effort import Effort
from evopress.search.record.resume import ResumeFolder
from evopress.search.space import Candidate, Space

S = TypeVar("S")
"""Settings of the strategy."""


@dataclass(frozen=True)
class Context(Generic[S]):
    """One named search of a run."""

    run: Run
    name: str
    settings: S
    compute: ComputeSettings
    space: Space
    store: VariantStore | None
    """Where the weights of the space's levels lie; None where modules are kept or dropped."""
    resume: ResumeFolder
    ranks: Ranks
    trust_remote_code: bool = False

    @property
    def where(self) -> str:
        """Dotted path of the settings, for messages."""
        return f"searches.{self.name}"


@dataclass(frozen=True)
class Found:
    """The chosen candidate, and how it was found."""

    candidate: Candidate
    records: list[dict] = field(default_factory=list)
    """Judgements, as records of the TRACE schema."""
    effort: Effort = field(default_factory=Effort)


Strategy = Callable[[Context[Any]], Found | None]
"""None in a process that only helps the first."""
