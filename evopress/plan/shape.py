"""The shape of a model, from its config alone: no weight is read or made."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from evopress.artifacts.paths import Run
from evopress.compression.base import Method, Unit
from evopress.config.model import ModelSettings
from evopress.export.base import Exporter
from evopress.models.blockwise import BlockwiseModel
from evopress.models.config_file import prepared_model, source_bytes, source_file
from evopress.models.gguf_config import read_config
from evopress.models.skeleton import built_on_meta, load_config, skeleton_of
from evopress.models.structure import find_blocks, layer_table, outer_table
from evopress.search.base import Strategy
from evopress.search.problem import file_facts
from evopress.search.target import FileFacts, SizeTarget
from evopress.util.device import working_dtype

_FEW = 8
"""Vocabulary of the twin that is run to see which layers share an input; what follows does not depend on it."""


@dataclass(kw_only=True)
class ModelShape(BlockwiseModel):
    """A model without weights: nothing is read or computed, and hidden states take no memory.

    ``stored`` is the type of its weights, ``dtype`` that in which a device works with them.
    """

    layers: pd.DataFrame
    """Linear layers, with the LAYERS schema."""
    source: int | None = None
    """Bytes of the quantized file that the model comes from, where it comes from one of a known size."""

    @cached_property
    def outer(self) -> pd.DataFrame:
        """Input embedding and head, as `outer_table` has them."""
        return outer_table(self.model)

    @cached_property
    def inside(self) -> int:
        """Parameters of all blocks."""
        return sum(parameter.numel() for block in self.blocks for parameter in block.parameters())

    @cached_property
    def outside(self) -> int:
        """Parameters outside the blocks: embedding, head, last norm; tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters()) - self.inside

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the type of the device."""
        return self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return (self.outside + self.inside) * self.stored.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block on the device, on average."""
        return self.inside * self.itemsize // len(self.blocks)

    def block_flops(self, length: float) -> float:
        """Operations of one token in one block, on average, in sequences of ``length`` tokens.

        Two for each weight, and attention's two products with all tokens of the sequence (the causal half is not
        taken off).
        """
        heads = self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.hidden_size // heads
        return float(2 * self.layers["parameters"].sum() / len(self.blocks) + 4 * length * head_dim * heads)

    @property
    def head_flops(self) -> float:
        """Operations of the logits of one token."""
        return 2 * self.hidden_size * self.vocab_size

    def on(self, device: str) -> "ModelShape":
        """As a device of this type works with it; one that is not a CPU need not be there."""
        dtype = working_dtype(self.stored, torch.device(device))
        return replace(self, device=torch.device("cpu" if device == "cpu" else "meta"), dtype=dtype)

    def load_block(self, index: int, *, linear_weights: bool = True) -> None:
        """Leave the block as it is."""

    def embed(self, input_ids: Tensor, weight: Tensor | None = None) -> Any:
        """Hidden states of ``input_ids`` [S, L] that take no memory, [S, L, H], and nothing beside them."""
        return torch.empty(1, dtype=self.dtype).expand(*input_ids.shape, self.hidden_size), None

    def table(self, method: Method, where: str) -> pd.DataFrame:
        """`Method.table` of the layers that ``method`` compresses; ``where`` is the dotted path of its settings."""
        layers = pd.concat([self.layers, self.outer]) if method.compresses_embedding else self.layers
        return method.table(layers, self.stored.itemsize, where)

    def file(self, units: Sequence[Unit]) -> FileFacts:
        """About what a file holds beside ``units``, which are searched.

        Header and tokenizer are left out, and all that has no levels counts in the type of the model.
        """
        parameters = self.outside + self.inside
        searched = sum(unit.parameters for unit in units)
        work = int(self.layers["parameters"].sum()) + self.hidden_size * self.vocab_size
        return FileFacts((parameters - searched) * self.stored.itemsize, self.bytes, parameters, work, self.source)


def shape_of(settings: ModelSettings, run: Run) -> ModelShape | None:
    """Shape of the model that the settings name, or None where nothing but its weights would tell.

    Of a hub model, config.json is fetched unless it is in the cache. A wheel can be read once it has been fetched.

    Raises:
        ModelError: a file is missing or damaged, or the architecture cannot be handled.
        ConfigError: config.json cannot be fetched.
    """
    trust = settings.trust_remote_code
    if settings.quantized and run.model_manifest.is_file():  # a finished model stage; nothing less is trusted
        config = load_config(run.model, trust_remote_code=trust)
    elif (path := source_file(settings)) is None:
        return None
    else:
        config = read_config(path) if settings.quantized else load_config(path.parent, trust_remote_code=trust)
    named = None if settings.quantized else config.dtype or config.get_text_config().dtype
    dtype = named or torch.bfloat16 if settings.dtype == "source" else getattr(torch, settings.dtype)
    return replace(
        shape_from_config(config, dtype, trust_remote_code=trust),
        source=source_bytes(settings, run),
    )


def shape_from_config(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> ModelShape:
    """Shape of the model of a transformers config.

    Raises:
        UnsupportedArchitectureError: it cannot be run block by block.
    """
    model = built_on_meta(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    name, blocks = find_blocks(model)
    names = [f"{name}.{index}" for index in range(len(blocks))]
    nothing: Any = None  # of what surrounds the blocks, and of a checkpoint
    layers = _layers(config, dtype, trust_remote_code)
    meta = torch.device("meta")
    return ModelShape(model, nothing, nothing, list(blocks), names, meta, dtype, dtype, layers=layers)


def _layers(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> pd.DataFrame:
    """Table of the linear layers, from a twin with a small vocabulary.

    What surrounds the blocks is run for the table, so it needs values: those of a real vocabulary would take
    gigabytes.
    """
    small = copy.deepcopy(config)
    for part in (small, small.get_text_config()):
        part.vocab_size = _FEW
        part.pad_token_id = None
    twin = skeleton_of(small, dtype, trust_remote_code=trust_remote_code)
    prefix = find_blocks(twin)[0] + "."
    for name, parameter in list(twin.named_parameters(remove_duplicate=False)):
        if not name.startswith(prefix):
            owner, _, leaf = name.rpartition(".")
            zeros = torch.zeros(parameter.shape, dtype=dtype)
            twin.get_submodule(owner).register_parameter(leaf, nn.Parameter(zeros, requires_grad=False))
    return layer_table(twin)


def file_of(
    settings: ModelSettings, run: Run, shape: ModelShape, target: float | SizeTarget
) -> Callable[[Sequence[Unit]], FileFacts]:
    """What gives the facts of the file of a target: as the search has them where the model is prepared, else about."""
    if isinstance(target, SizeTarget) and prepared_model(settings, run) is not None:
        return partial(file_facts, run, target)
    return shape.file


def uncounted(settings: ModelSettings, run: Run, searches: Mapping[str, Strategy]) -> list[str]:
    """What sizes of files leave out before the model is prepared, as one sentence or none."""
    sized = [
        name
        for name, search in searches.items()
        if isinstance(search.target, SizeTarget) and isinstance(search.target.file, Exporter)
    ]
    if not sized or prepared_model(settings, run) is not None:
        return []
    return [
        f"The model is not prepared yet, so header and tokenizer of the files of {', '.join(sized)} are not counted, "
        "and what has no levels counts in the type of the model; the search itself counts exactly."
    ]
