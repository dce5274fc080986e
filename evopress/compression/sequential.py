"""Sequential variants, whose Hessians see compressed blocks: a chain of jobs, each of one block or several.

As GPTQ's authors do (arXiv 2210.17323, section 4), calibration tokens run through the compressed model: the Hessians
of a block come from hidden states that the compressed blocks before it returned. Within a block, all layers are
observed before any is compressed. One level is chosen to run on with; its hidden states pass from job to job in a file.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import dropwhile
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, require_same_model
from evopress.artifacts.tables import read_provenance
from evopress.artifacts.tensors import check_tensors, read_tensors, write_tensors
from evopress.compression.base import LayerMethod, Variant
from evopress.compression.block_files import is_made, put_in_place, variant_table, write_packed
from evopress.compression.formats import decode
from evopress.compression.hessian import batch_size, embed, observe_block
from evopress.compression.stage import compress_layers, included_layers, variants_provenance
from evopress.config.context import StageContext
from evopress.data.tokens import read_tokens
from evopress.models.blockwise import BlockInputs, BlockwiseModel
from evopress.models.verify import check_model
from evopress.util.errors import ArtifactError, CompressionError
from evopress.util.progress import log

_STATE = "hidden"
"""Name of the hidden states, [S, L, H], in the file between two jobs."""


def make_sequential_variants(context: StageContext, name: str, method: LayerMethod, blocks: Sequence[int]) -> None:
    """Compress blocks to every level, given what the compressed ones before each make of the calibration tokens.

    Writes the variants of each of the ``blocks``, which follow one another, and the hidden states after it at
    ``method.propagation_level``; the Hessians are not kept, since they hold for this chain only. What is made is kept
    aside until all blocks are there, so that a job that was killed goes on with the block that it was at.

    Raises:
        ArtifactError: tokens, layers or the hidden states are missing, damaged, or of another model or chain.
        CompressionError: a layer cannot be compressed as asked, or lacks the level; the message names it.
        ConfigError: a pattern of ``exclude`` matches no layer, or the device is not there.
        ModelError: a weight cannot be read.
    """
    run = context.run
    layers = {block: included_layers(run, name, method, block) for block in blocks}
    provenance = variants_provenance(context, method)
    tokens = read_tokens(run, "calibration")
    facts = calibration_facts(run, tokens)
    check_model(run)
    model = BlockwiseModel.from_folder(
        run.model, context.device, resident=False, quick=True, trust_remote_code=context.trust_remote_code
    )
    todo = list(dropwhile(lambda block: is_made(run, name, block, provenance, facts, chain=True), blocks))
    first = todo[0] if todo else blocks[-1]
    hidden, inputs = embed(model, tokens[:1] if first else tokens)
    if first:
        before = run.chain_state if first == blocks[0] else run.made_state
        hidden = _read_state(before(name, first - 1), provenance, facts).to(model.dtype)
    for block in todo:
        model.load_block(block)
        variants = _make_block(context, name, method, model, block, hidden, inputs, layers[block])
        model.unload_block(block)
        if block + 1 == len(model.blocks):
            hidden = hidden[:0]  # nothing comes after
        table = variant_table(variants, layers[block], method)
        paths = run.made_tensors(name, block), run.made_table(name, block)
        write_packed(*paths, variants, table, provenance, facts)
        write_tensors({_STATE: hidden}, run.made_state(name, block), provenance, facts)
    put_in_place(run, name, blocks, chain=True)


def _make_block(
    context: StageContext,
    name: str,
    method: LayerMethod,
    model: BlockwiseModel,
    block: int,
    hidden: Tensor,
    inputs: BlockInputs,
    layers: pd.DataFrame,
) -> list[Variant]:
    """Variants of a block; hidden states [S, L, H] before it become those after it, unless it is the last."""
    hessians = observe_block(model, block, hidden, inputs, layers, outputs=False)
    description = f"variants {name}, block {block}"
    variants = compress_layers(context, description, method, layers, hessians.__getitem__)
    shapes = dict(zip(layers["layer"], zip(layers["rows"], layers["columns"], strict=True), strict=True))
    weights = unpacked(_at_level(variants, str(method.propagation_level), shapes), shapes, model)
    if block + 1 < len(model.blocks):
        advance(model, block, hidden, inputs, weights)
        log.info("%s: %d sequences go on at level %s", description, len(hidden), method.propagation_level)
    return variants


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
