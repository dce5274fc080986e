"""What an exporter consists of.

An **exporter** is the pydantic class of its settings. It writes the model that a search has chosen into a folder in
some form, and has the words for the model card. The stage around it puts the folder in place, with a manifest. To add
one, write a file in `exporters/` and name it in the registry there (docs/extending.md).

Snakemake imports this module while it parses, so whatever takes long to import is imported inside functions.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from evopress.compression.base import Method
from evopress.compression.families import LayerFamily
from evopress.compression.layers import LayerShape
from evopress.config.base import Section
from evopress.config.context import StageContext
from evopress.search.base import Strategy

if TYPE_CHECKING:
    from evopress.artifacts.paths import Run
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

    has_size: ClassVar[bool] = False
    """Whether its file is what the target of a search may be the size of."""

    weights: ClassVar[str] = ".safetensors"
    """How the names of the files end that hold its weights; their size is told in cards and comparisons."""

    of_dropped: ClassVar[bool] = False
    """Whether it is for models that lost modules alone."""

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

    def unfit(
        self, where: str, method: Method, layers: Sequence[LayerShape], dtype: str | None, model_type: str | None
    ) -> Iterator[str]:
        """Say why it cannot write this model, as far as that is known from the model's config.

        Args:
            where: dotted path of the setting that asks for it, with which each problem begins.
            method: makes the variants that the search picks from.
            layers: linear layers of the model; none where its config does not tell.
            dtype: of the model's weights, as in `bfloat16`; None where that is not known.
            model_type: what transformers calls the architecture; None where that is not known.
        """
        yield from ()

    def ties(self) -> tuple[tuple[str, ...], ...]:
        """What it adds to the `tied` layers of a search: those of one module that must share a level to be written.

        Each group has the last parts of their names, as in `(q_proj, k_proj, v_proj)`.
        """
        return ()

    def levels(self, method: Method) -> tuple[str, ...] | None:
        """Labels of the levels of ``method`` that it can write; None are all. A search is offered no others."""
        return None

    def fixed_bytes(self, run: "Run", searched: Collection[str]) -> int:
        """Bytes of its file beside the weights named ``searched``, whose levels are yet to be chosen.

        Raises:
            ModelError: the dense checkpoint, or the tokenizer, cannot be read.
            UnsupportedArchitectureError: it cannot hold a model like this one.
        """
        raise NotImplementedError

    def stored_bytes(self, size: int) -> int:
        """What its file takes for a weight that is packed in ``size`` bytes."""
        return size

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
