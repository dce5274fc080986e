"""The shape of a model, from its config alone: no weight is read or made."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from evopress.artifacts.paths import Run
from evopress.compression.base import Method, Unit
from evopress.config.model import FolderModel, GgufModel, HubModel, ModelSettings
from evopress.export.base import Exporter
from evopress.models.block_count import hub_config
from evopress.models.buildable import built_on_meta
from evopress.models.gguf_config import read_config
from evopress.models.skeleton import load_config, skeleton_of
from evopress.models.structure import find_blocks, layer_table, outer_table
from evopress.plan.model_config import prepared_model, source_bytes
from evopress.search.base import Strategy
from evopress.search.problem import file_facts
from evopress.search.target import FileFacts, SizeTarget
from evopress.util.device import precise_dtype, working_dtype

_FEW = 8
"""Vocabulary of the twin that is run to see which layers share an input; what follows does not depend on it."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide what a run needs."""

    architecture: str
    layers: pd.DataFrame
    """Linear layers, with the LAYERS schema."""
    outer: pd.DataFrame
    """Input embedding and head, as `outer_table` has them."""
    blocks: int
    hidden_size: int
    vocab_size: int
    attention_width: int
    """Heads times head dimension: what the scores of attention are computed from."""
    dtype: torch.dtype
    outside: int
    """Parameters outside the blocks: embedding, head, last norm; tied ones once."""
    inside: int
    """Parameters of all blocks."""
    positions: int | None = None
    """Tokens of the longest sequence that the model was made for, where its config says so."""
    source: int | None = None
    """Bytes of the quantized file that the model comes from, where it comes from one of a known size."""

    @cached_property
    def modules(self) -> list[dict[str, int]]:
        """Weights of the linear layers of each block's modules, by kind (`attn`, `mlp`)."""
        found: list[dict[str, int]] = [{} for _ in range(self.blocks)]
        for layer in self.layers.to_dict("records"):
            of_block, kind = found[layer["block"]], layer["module"]
            of_block[kind] = of_block.get(kind, 0) + int(layer["parameters"])
        return found

    def on(self, device: str) -> "ModelShape":
        """As a device of this type works with it."""
        return replace(self, dtype=working_dtype(self.dtype, torch.device(device)))

    def table(self, method: Method, where: str) -> pd.DataFrame:
        """`Method.table` of the layers that ``method`` compresses; ``where`` is the dotted path of its settings."""
        layers = pd.concat([self.layers, self.outer]) if method.compresses_embedding else self.layers
        return method.table(layers, self.itemsize, where)

    def file(self, units: Sequence[Unit]) -> FileFacts:
        """About what a file holds beside ``units``, which are searched.

        Header and tokenizer are left out, and all that has no levels counts in the type of the model.
        """
        searched = sum(unit.parameters for unit in units)
        parameters = self.outside + self.inside
        return FileFacts((parameters - searched) * self.itemsize, self.bytes, parameters, self.source)

    @property
    def precise(self) -> "ModelShape":
        """As a search works with it where rounding would hide single effects."""
        return replace(self, dtype=precise_dtype(self.dtype))

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter."""
        return self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        return (self.outside + self.inside) * self.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, on average."""
        return self.inside * self.itemsize // self.blocks

    def block_flops(self, length: int) -> float:
        """Operations of one token in one block, on average, in sequences of ``length`` tokens.

        Two for each weight, and attention's two products with all tokens of the sequence (the causal half is not
        taken off).
        """
        return 2 * self.layers["parameters"].sum() / self.blocks + 4 * length * self.attention_width

    @property
    def head_flops(self) -> float:
        """Operations of the logits of one token."""
        return 2 * self.hidden_size * self.vocab_size


def shape_of(settings: ModelSettings, run: Run) -> ModelShape | None:
    """Shape of the model that the settings name, or None where nothing but its weights would tell.

    Of a hub model, config.json is fetched unless it is in the cache. A wheel can be read once it has been fetched.

    Raises:
        ModelError: a file is missing or damaged, or the architecture cannot be handled.
        ConfigError: config.json cannot be fetched.
    """
    config = _config(settings, run)
    if config is None:
        return None
    shape = shape_from_config(config, _dtype(settings, config), trust_remote_code=settings.trust_remote_code)
    return replace(shape, source=source_bytes(settings, run))


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


def shape_from_config(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> ModelShape:
    """Shape of the model of a transformers config.

    Raises:
        UnsupportedArchitectureError: it cannot be run block by block.
    """
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    architecture, blocks, total, inside, outer = _sizes(config, trust_remote_code)
    return ModelShape(
        architecture=architecture,
        layers=_layers(config, dtype, trust_remote_code),
        outer=outer,
        blocks=blocks,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        attention_width=width * text.num_attention_heads,
        dtype=dtype,
        outside=total - inside,
        inside=inside,
        positions=getattr(text, "max_position_embeddings", None),
    )


def _sizes(config: Any, trust_remote_code: bool) -> tuple[str, int, int, int, pd.DataFrame]:
    """Architecture, blocks, parameters, those inside the blocks, and what is outside: the modules are not kept."""
    model = built_on_meta(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    _, blocks = find_blocks(model)
    return type(model).__name__, len(blocks), _parameters([model]), _parameters(blocks), outer_table(model)


def _config(settings: ModelSettings, run: Run) -> Any:
    trust = settings.trust_remote_code
    if isinstance(settings, FolderModel):
        return load_config(Path(settings.path), trust_remote_code=trust)
    if isinstance(settings, HubModel):
        return load_config(hub_config(settings).parent, trust_remote_code=trust)
    if run.model_manifest.is_file():  # a finished model stage; nothing less is trusted
        return load_config(run.model, trust_remote_code=trust)
    if isinstance(settings, GgufModel):
        return read_config(Path(settings.path))
    return None


def _dtype(settings: ModelSettings, config: Any) -> torch.dtype:
    """Type in which the weights will be kept; 16 bits where neither settings nor config name one."""
    if settings.dtype != "source":
        return getattr(torch, settings.dtype)
    if not isinstance(settings, (FolderModel, HubModel)):
        return torch.bfloat16
    return config.dtype or config.get_text_config().dtype or torch.bfloat16


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


def _parameters(modules: nn.ModuleList | Sequence[nn.Module]) -> int:
    """Parameters of modules, shared ones once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
