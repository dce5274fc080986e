"""Sequential variants, whose Hessians see compressed blocks: a chain of jobs, one for each block.

As GPTQ's authors do (arXiv 2210.17323, section 4), calibration tokens run through the compressed model: the Hessians
of a block come from hidden states that the compressed blocks before it returned. Within a block, all layers are
observed before any is compressed. One level is chosen to run on with; its hidden states pass from job to job in a file.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, require_same_model
from evopress.artifacts.tables import read_provenance
from evopress.artifacts.tensors import check_tensors, read_tensors, write_tensors
from evopress.compression.base import LayerMethod, Variant
from evopress.compression.formats import decode
from evopress.compression.hessian import batch_size, embed, observe_block
from evopress.compression.stage import (
    compress_layers,
    included_layers,
    variant_table,
    variants_provenance,
    write_variants,
)
from evopress.config.context import StageContext
from evopress.data.tokens import read_tokens
from evopress.models.blockwise import BlockInputs, BlockwiseModel
from evopress.models.verify import check_model
from evopress.util.errors import ArtifactError, CompressionError
from evopress.util.progress import log

_STATE = "hidden"
"""Name of the hidden states, [S, L, H], in the file between two jobs."""


def make_sequential_variants(context: StageContext, name: str, method: LayerMethod, block: int) -> None:
    """Compress a block to every level, given what the compressed blocks before it make of the calibration tokens.

    Writes the variants, and the hidden states after the block at ``method.propagation_level``; the Hessians are not
    kept, since they hold for this chain only.

    Raises:
        ArtifactError: tokens, layers or the hidden states are missing, damaged, or of another model or chain.
        CompressionError: a layer cannot be compressed as asked, or lacks the level; the message names it.
        ConfigError: a pattern of ``exclude`` matches no layer, or the device is not there.
        ModelError: a weight cannot be read.
    """
    run = context.run
    layers = included_layers(run, name, method, block)
    provenance = variants_provenance(context, method)
    tokens = read_tokens(run, "calibration")
    facts = calibration_facts(run, tokens)
    check_model(run)
    model = BlockwiseModel.from_folder(
        run.model, context.device, resident=False, quick=True, trust_remote_code=context.trust_remote_code
    )
    hidden, inputs = embed(model, tokens[:1] if block else tokens)
    if block:
        hidden = _read_state(run.chain_state(name, block - 1), provenance, facts).to(model.dtype)
    model.load_block(block)
    hessians = observe_block(model, block, hidden, inputs, layers, outputs=False)
    description = f"variants {name}, block {block}"
    variants = compress_layers(context, description, method, layers, hessians.__getitem__)
    shapes = dict(zip(layers["layer"], zip(layers["rows"], layers["columns"], strict=True), strict=True))
    weights = unpacked(_at_level(variants, str(method.propagation_level), shapes), shapes, model)
    if block + 1 < len(model.blocks):
        advance(model, block, hidden, inputs, weights)
    else:
        hidden = hidden[:0]  # nothing comes after
    table = variant_table(variants, layers, method)
    write_variants(run, name, block, variants, table, provenance, facts)
    write_tensors({_STATE: hidden}, run.chain_state(name, block), provenance, facts)
    log.info("%s: %d sequences go on at level %s", description, len(hidden), method.propagation_level)


def calibration_facts(run: Run, tokens: Tensor) -> dict[str, object]:
    """What calibrates blocks in sequence, for the manifests of all of them."""
    path = run.tokens("calibration")
    provenance = read_provenance(path)
    require_same_model(run, provenance, path)
    text = json.loads(provenance.settings)
    made_from = {"calibration": text, "propagation": "sequential"}
    return {"hessians": made_from, "tokens": tokens.numel(), "tokens_sha256": sha256(path)}


def _read_state(path: Path, provenance: Provenance, facts: Mapping[str, object]) -> Tensor:
    """Hidden states [S, L, H] as the job before has left them."""
    manifest = check_tensors(path)
    if Provenance(**manifest["provenance"]) != provenance or manifest["facts"] != facts:
        raise ArtifactError(f"{path}: belongs to another model, other settings or other tokens; delete it, run again")
    return read_tensors(path, [_STATE])[_STATE]


def _at_level(variants: Sequence[Variant], level: str, layers: Collection[str]) -> list[Variant]:
    """The variant of each layer at one level.

    Raises:
        CompressionError: a layer has no such level.
    """
    chosen = [variant for variant in variants if variant.level == level]
    if lacking := sorted(set(layers) - {variant.layer for variant in chosen}):
        own = ", ".join(variant.level for variant in variants if variant.layer == lacking[0])
        raise CompressionError(
            f"{', '.join(lacking)}: no room for the propagation_level {level}; choose one that all layers have ({own})"
        )
    return chosen


def unpacked(
    variants: Iterable[Variant], shapes: Mapping[str, tuple[int, int]], model: BlockwiseModel
) -> dict[str, Tensor]:
    """Weights by layer, as the model computes with them; ``shapes`` are of the layers."""
    return {
        one.layer: decode(one.format, one.parts, shapes[one.layer], model.stored, model.device).to(model.dtype)
        for one in variants
    }


@torch.no_grad()
def advance(
    model: BlockwiseModel, block: int, hidden: Tensor, inputs: BlockInputs, weights: Mapping[str, Tensor]
) -> None:
    """Replace hidden states [S, L, H] by what the block makes of them with ``weights``."""
    for part in hidden.split(batch_size(hidden)):
        part.copy_(model.run_block(block, part.to(model.device), inputs, weights))
