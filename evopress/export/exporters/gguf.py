"""A GGUF file: the blocks that the search judged, byte for byte, and the rest as the settings say."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from evopress.compression.base import Method
from evopress.compression.families import LayerFamily
from evopress.compression.layers import LayerShape
from evopress.export.base import Exporter
from evopress.search.base import Strategy
from evopress.search.target import SizeTarget
from evopress.util.errors import ArtifactError
from evopress.util.progress import log

if TYPE_CHECKING:
    from evopress.artifacts.paths import Run
    from evopress.compression.dropped import Dropped
    from evopress.config.context import StageContext
    from evopress.export.compressed import CompressedModel
    from evopress.export.gguf.file import Packed

MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""What transformers calls the architectures that can be written: the keys of `evopress.export.gguf.layouts.LAYOUTS`."""
_PREFIX = "gguf-"
"""Of the names of formats that hold blocks of a GGUF type."""


class GgufFile(Exporter):
    """A GGUF file, which llama.cpp and what is built on it run."""

    library: ClassVar[str] = "gguf"
    has_size: ClassVar[bool] = True
    weights: ClassVar[str] = ".gguf"
    reads: ClassVar[tuple[str, ...]] = ("huggingface",)

    exporter: Literal["gguf"] = "gguf"
    dense: Literal["f32", "f16", "bf16", "q8_0"] = Field(
        "f16", description="Type of matrices that no search has compressed, such as the embedding."
    )
    dequantize: bool = Field(
        False,
        description="Write layers compressed to what is no GGUF type as dense matrices, instead of refusing them.",
    )

    def problems(self, where: str, method: Method, strategy: Strategy) -> Iterator[str]:
        """Levels that are no GGUF types."""
        strange = method.per_block and method.formats != _PREFIX
        if strange and not self.dequantize:
            yield (
                f"{where}: {strategy.variants!r} has levels that are no GGUF types; search over variants of "
                "`method: gguf`, or write `{exporter: gguf, dequantize: true}` to have them as dense matrices"
            )
        if strange and self.dequantize and isinstance(strategy.target, SizeTarget):
            yield (
                f"{where}: dense matrices are as large whatever their level, so the file cannot be the target; give an "
                "average"
            )

    def write(self, context: "StageContext", search: str, folder: Path) -> None:
        """Write `<search>.gguf` into ``folder``.

        What is not packed in a GGUF type is taken from the search's Hugging Face folder, which must be there.

        Raises:
            ArtifactError: the configuration or a variant is missing, damaged, of another model, or no GGUF type.
            UnsupportedArchitectureError: llama.cpp has no code that computes this model.
            ModelError: the tokenizer cannot be carried over.
        """
        from gguf import GGMLQuantizationType

        from evopress.artifacts.model_facts import read_model_facts
        from evopress.export.compressed import CompressedModel
        from evopress.export.gguf.file import write_gguf

        run, model = context.run, CompressedModel(context, search)
        source, facts = run.export(search, "huggingface"), read_model_facts(run)
        write_gguf(
            source,
            folder / f"{search}.gguf",
            dict(self._packed(model)),
            name=facts.name,
            card=facts.card,
            dense=GGMLQuantizationType[self.dense.upper()],
            absent=_absent(source, model.dropped),
        )

    def unfit(
        self, where: str, method: Method, layers: Sequence[LayerShape], dtype: str | None, model_type: str | None
    ) -> Iterator[str]:
        """Architectures that llama.cpp, or this exporter, does not know."""
        if model_type is not None and model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            yield f"{where}: models of the type {model_type} cannot be written as GGUF; those that can are {known}"

    def fixed_bytes(self, run: "Run", searched: Collection[str]) -> int:
        """Header, tokenizer and all tensors that have no levels."""
        from gguf import GGMLQuantizationType

        from evopress.artifacts.model_facts import read_model_facts
        from evopress.export.gguf.file import fixed_bytes

        facts, dense = read_model_facts(run), GGMLQuantizationType[self.dense.upper()]
        return fixed_bytes(run.model, searched, name=facts.name, card=facts.card, dense=dense)

    def stored_bytes(self, size: int) -> int:
        """Filled up to where the next tensor may begin."""
        from evopress.export.gguf.file import stored_bytes

        return stored_bytes(size)

    def usage(self, folder: str) -> str:
        """With llama.cpp's own program."""
        return f"```sh\nllama-cli -m {folder}/*.gguf -p 'Hello'\n```"

    def storage(self, family: LayerFamily) -> str:
        """As blocks of GGUF types."""
        return (
            "Each compressed layer is stored in the GGUF type that the search chose for it, byte for byte as it was "
            f"evaluated; other matrices are {self.dense.upper()}, and vectors F32."
        )

    def _packed(self, model: "CompressedModel") -> "Iterator[tuple[str, Packed]]":
        """Blocks of the layers that are packed in a GGUF type, by the name of the weight in the exported model."""
        from gguf import GGMLQuantizationType

        from evopress.export.gguf.file import Packed

        for name in model.choices:
            kind, parts = model.packed(name)
            if kind.startswith(_PREFIX):
                blocks = parts["blocks"].numpy()
                yield model.layout.names[name], Packed(blocks, GGMLQuantizationType[kind.removeprefix(_PREFIX)])
            elif self.dequantize:
                log.warning("%s: %s is no GGUF type; written as a dense %s matrix", name, kind, self.dense)
            else:
                raise ArtifactError(
                    f"{name}: is stored as {kind}, which is no GGUF type; search over variants that are, or set "
                    "`dequantize: true` to write such layers as dense matrices"
                )


def _absent(model: Path, dropped: "Dropped | None") -> set[tuple[int, str]]:
    """Modules that the file can do without: those dropped alone from a Llama; elsewhere they give out zeros."""
    from evopress.export.gguf.layouts import layout_of
    from evopress.models.skeleton import load_config

    if dropped is None or layout_of(load_config(model).get_text_config()).architecture != "llama":
        return set()
    numbers = {block: number for number, block in enumerate(dropped.kept)}
    return {(numbers[block], kind) for block, kind in dropped.single}
