"""What an exporter consists of.

An **exporter** is the pydantic class of its settings. It writes the model that a search has chosen into a folder in
some form, and has the words for the model card. The stage around it puts the folder in place, with a manifest. To add
one, write a file in `exporters/` and name it in the registry there (docs/extending.md).

Snakemake imports this module while it parses, so whatever takes long to import is imported inside functions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from evopress.compression.base import LayerShape, Level, Method
from evopress.compression.families import LayerFamily
from evopress.config.base import Section
from evopress.config.context import StageContext
from evopress.search.base import Strategy

if TYPE_CHECKING:
    from evopress.compression.dropped import Dropped


@dataclass(frozen=True, kw_only=True)
class ExportContext(StageContext):
    """An export of a run."""

    polished: bool = False
    """Whether what a search chose is taken as its polish has made it, and not from the variants."""


class Exporter(Section):
    """A form in which a compressed model is written; a subclass has a field ``exporter: Literal["its-name"]``.

    All its settings have defaults, since the name alone may stand for it.
    """

    has_card: ClassVar[bool] = True
    """Whether its folder is published as it is, with a model card."""
    library: ClassVar[str] = "transformers"
    """What loads the folder, in the words of the hub's model cards."""
    relation: ClassVar[str | None] = "quantized"
    """To the original, in the words of the hub's model cards; None where the hub has no word."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Other exports of the same search that must be there before."""

    exporter: str = ""

    def problems(self, where: str, method: Method, strategy: Strategy) -> Iterator[str]:
        """Say why it cannot write what a search finds; as far as that is known from the settings alone.

        Args:
            where: dotted path of the setting that asks for it, with which each problem begins.
            method: makes the variants that the search picks from.
            strategy: of the search.
        """
        yield from ()

    def ties(self, layers: Sequence[LayerShape]) -> list[list[str]]:
        """Groups of names of layers that must share a level for this exporter to write them."""
        return []

    def allows(self, level: Level) -> bool:
        """Whether it can write layers at this level."""
        return True

    def write(self, context: StageContext, search: str, folder: Path) -> None:
        """Write what ``search`` has chosen into ``folder``, which is empty and takes its place when this returns.

        Raises:
            ArtifactError: an artifact is missing, damaged or of another model, or the folder cannot be written.
            ModelError: the dense checkpoint is damaged.
            UnsupportedArchitectureError: it cannot hold a model like this one.
        """
        raise NotImplementedError

    def usage(self, folder: str) -> str:
        """How to run what lies in ``folder``: Markdown for the model card."""
        raise NotImplementedError

    def storage(self, family: LayerFamily) -> str:
        """How its folder holds layers at levels of a family: sentences for the model card."""
        return ""

    def absent(self, dropped: "Dropped") -> "Dropped":
        """Dropped modules that its folder does not hold at all; the others give zeros."""
        return dropped.whole_blocks()
