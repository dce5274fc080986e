"""A GGUF file: the blocks that the search judged, byte for byte, and the rest as the settings say."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evopress.artifacts.paths import Run
from evopress.config.base import Section
from evopress.config.context import StageContext
from evopress.util.errors import ArtifactError
from evopress.util.progress import log

if TYPE_CHECKING:
    import pandas as pd

    from evopress.compression.dropped import Dropped
    from evopress.export.gguf.file import Packed

_PREFIX = "gguf-"
"""Of the names of formats that hold blocks of a GGUF type."""


class GgufExporter(Section):
    """One file that llama.cpp and what is built on it run."""

    exporter: Literal["gguf"] = "gguf"
    dense: Literal["f32", "f16", "bf16", "q8_0"] = Field(
        "f16", description="Type of matrices that no search has compressed, such as the embedding."
    )
    dequantize: bool = Field(
        False,
        description="Write layers compressed to what is no GGUF type as dense matrices, instead of refusing them.",
    )

    def write(self, context: StageContext, search: str, folder: Path) -> None:
        """Write `<search>.gguf` into ``folder``.

        What is not packed in a GGUF type is taken from the search's Hugging Face folder, which must be there.

        Raises:
            ArtifactError: the configuration or a variant is missing, damaged, of another model, or no GGUF type.
            UnsupportedArchitectureError: llama.cpp has no code that computes this model.
            ModelError: the tokenizer cannot be carried over.
        """
        from gguf import GGMLQuantizationType

        from evopress.artifacts.model_facts import read_model_facts
        from evopress.export.gguf.file import write_gguf
        from evopress.export.run import read_dropped
        from evopress.search.configuration import read_configuration

        run = context.run
        configuration = read_configuration(run, search)
        dropped = read_dropped(run, configuration)
        write_gguf(
            run.stitched(search),
            folder / f"{search}.gguf",
            dict(self._packed(run, configuration, dropped)),
            name=f"{read_model_facts(run).name} {search}",
            dense=GGMLQuantizationType[self.dense.upper()],
            absent=_absent(run.stitched(search), dropped),
        )

    def usage(self, folder: str) -> str:
        """How to run the file in the folder of that name, in Markdown."""
        return f"```sh\nllama-cli -m {folder}/*.gguf -p 'Hello'\n```"

    def _packed(
        self, run: Run, configuration: "pd.DataFrame", dropped: "Dropped | None"
    ) -> Iterator[tuple[str, "Packed"]]:
        """Blocks of the layers that are packed in a GGUF type, by the name of the weight in the exported model."""
        from gguf import GGMLQuantizationType

        from evopress.compression.measure import of_modules
        from evopress.compression.store import VariantStore
        from evopress.export.gguf.file import Packed

        layers = configuration[~of_modules(configuration)]
        stores = {name: VariantStore(run, name) for name in sorted(layers["variants"].unique())}
        numbers = {block: number for number, block in enumerate(dropped.kept)} if dropped else None
        for row in layers.to_dict("records"):
            store, where = stores[row["variants"]], (row["block"], row["layer"], row["level"])
            kind = store.format(*where)
            if numbers is not None and row["block"] not in numbers:
                continue
            if not kind.startswith(_PREFIX):
                self._require_dequantize(row["unit"], kind)
                continue
            block = row["block"] if numbers is None else numbers[row["block"]]
            yield (
                f"model.layers.{block}.{row['layer']}.weight",
                Packed(store.packed(*where)["blocks"].numpy(), GGMLQuantizationType[kind.removeprefix(_PREFIX)]),
            )

    def _require_dequantize(self, unit: str, kind: str) -> None:
        if not self.dequantize:
            raise ArtifactError(
                f"{unit}: is stored as {kind}, which is no GGUF type; search over variants that are, or set "
                "`dequantize: true` to write such layers as dense matrices"
            )
        log.warning("%s: %s is no GGUF type; written as a dense %s matrix", unit, kind, self.dense)


def _absent(model: Path, dropped: "Dropped | None") -> set[tuple[int, str]]:
    """Modules that the file can do without: those dropped alone from a Llama; elsewhere they give out zeros."""
    from evopress.export.gguf.layouts import layout_of
    from evopress.models.skeleton import load_config

    if dropped is None or layout_of(load_config(model).get_text_config()).architecture != "llama":
        return set()
    numbers = {block: number for number, block in enumerate(dropped.kept)}
    return {(numbers[block], kind) for block, kind in dropped.single}
