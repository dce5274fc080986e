"""The Hugging Face folder: weights dequantized into the type of the dense checkpoint.

Any program that loads the original loads this model too, without code of ours.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evopress.compression.families import LayerFamily
from evopress.export.base import Exporter

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.config.context import StageContext

SHARD_BYTES = 5_000_000_000
"""What the hub's own tools cut at."""
_USAGE = """The folder loads like the original, and generates with a cache:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


class HuggingFace(Exporter):
    """A folder that loads like the original, with every weight in the original's type; evaluation reads it."""

    exporter: Literal["huggingface"] = "huggingface"
    shard_bytes: int = Field(SHARD_BYTES, ge=1, description="Bytes of weights that a file holds at most.")

    def write(self, context: "StageContext", search: str, folder: Path) -> None:
        """Write weights, config and everything else but the model card."""
        from evopress.export.compressed import CompressedModel
        from evopress.export.folder import copy_companions, write_weights
        from evopress.util.progress import progress

        model, source, trust = CompressedModel(context, search), context.run.model, context.trust_remote_code
        dropped = model.dropped
        with progress(f"export {search}", len(model.layout.names), "tensors") as bar:

            def weight(name: str, dense: "Tensor") -> "Tensor":
                """The chosen variant, dequantized; what has none stays."""
                bar.advance()
                return model.weight(name, dense)

            copy_companions(source, folder)
            if dropped:  # only then: it imports the code of all models
                from evopress.export.shorter import check_cut_config, check_single_modules, write_cut_config
            if dropped and len(dropped.kept) < dropped.blocks:
                write_cut_config(source, folder, dropped.kept, trust_remote_code=trust)
                check_cut_config(source, folder, dropped.kept, trust_remote_code=trust)
            write_weights(model.checkpoint, folder, model.layout.names, weight, self.shard_bytes)
            if dropped:
                check_single_modules(folder, dropped, trust_remote_code=trust)

    def usage(self, folder: str) -> str:
        """With transformers."""
        return _USAGE.format(folder=folder)

    def storage(self, family: LayerFamily) -> str:
        """As weights of the original's type."""
        return family.storage
