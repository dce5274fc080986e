"""The variants stage: all levels of all linear layers of a block, from its Hessians and its weights.

Input embedding and head are compressed by a job of their own (`make_embedding_variants`).
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from evopress.artifacts.manifest import sha256
from evopress.artifacts.paths import EMBEDDING, Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import LAYERS, read_provenance, read_table
from evopress.artifacts.tensors import check_tensors, read_tensors
from evopress.compression.base import LayerMethod, Variant
from evopress.compression.block_files import is_made, put_in_place, variant_table, write_packed, write_variants
from evopress.compression.layers import layer_shapes
from evopress.config.context import StageContext
from evopress.models.checkpoint import Checkpoint
from evopress.models.modules import HEAD
from evopress.models.verify import check_model
from evopress.util.errors import ArtifactError, CompressionError, ConfigError
from evopress.util.progress import log, note, progress


def make_variants(context: StageContext, name: str, method: LayerMethod, blocks: Sequence[int]) -> None:
    """Compress the linear layers of some blocks to every level; write the packed tensors of each block and their table.

    Reads Hessians and weights by name; the model itself is not built. What is made is kept aside until all blocks are
    there, so that a job that was killed goes on with the block that it was at.

    Raises:
        ArtifactError: Hessians or layers are missing, damaged or of another model; the disk is full.
        CompressionError: a layer cannot be compressed as asked; the message names it.
        ConfigError: a pattern of ``exclude`` matches no layer, or the device is not there.
        ModelError: a weight cannot be read.
    """
    for block in blocks:
        _make_block(context, name, method, block)
    put_in_place(context.run, name, blocks)


def _make_block(context: StageContext, name: str, method: LayerMethod, block: int) -> None:
    """Write the variants of one block where those of a job that goes on are kept, unless they are there."""
    run, provenance = context.run, variants_provenance(context, method)
    layers = included_layers(run, name, method, block)
    check_model(run)
    hessian, facts = _hessians(run, block) if method.needs_hessians else _given_hessians(run, name, method, block)
    if is_made(run, name, block, provenance, facts):
        log.info("variants %s, block %d: made before the job was killed", name, block)
        return
    variants = compress_layers(context, f"variants {name}, block {block}", method, layers, hessian)
    table = variant_table(variants, layers, method)
    paths = run.made_tensors(name, block), run.made_table(name, block)
    write_packed(*paths, variants, table, provenance, facts)


def make_embedding_variants(context: StageContext, name: str, method: LayerMethod) -> None:
    """Compress the input embedding and the head to every level.

    They are rounded to nearest, with the squares of the head's inputs as importance of the columns of a head, and of an
    embedding that is tied to it: what other columns could make up for in the logits would spoil the embedding. The
    columns of an embedding of its own are alike, and all are where the user gives importances, which know none of the
    head. How often a token occurs changes nothing in how its row is rounded.

    Raises:
        ArtifactError: the Hessian is missing, damaged or of another model; the disk is full.
        CompressionError: they cannot be compressed as asked; the message names which.
        ConfigError: the device is not there.
        ModelError: a weight cannot be read.
    """
    run = context.run
    check_model(run)
    given = not (method.needs_hessians or method.sequential)
    hessian, facts = (None, _digests(method)) if given else _hessians(run, EMBEDDING)
    layers = outer_layers(run, trust_remote_code=context.trust_remote_code)
    layers = layers[[not method.excludes(layer) for layer in layers["name"]]]
    shapes = layer_shapes(layers, itemsize=0)
    method.check(shapes, shapes)
    columns = dict(zip(layers["input_group"], layers["columns"], strict=True))

    def importance(group: str) -> Tensor:
        """A diagonal Hessian, so that nothing is made up for between columns."""
        return torch.eye(columns[group]) if hessian is None or group != HEAD else hessian(HEAD).diagonal().diag()

    variants = compress_layers(context, f"variants {name}, embedding", method.for_embedding(), layers, importance)
    facts["shapes"] = {layer.layer: [layer.rows, layer.columns] for layer in shapes}
    table = variant_table(variants, layers, method)
    write_variants(run, name, EMBEDDING, variants, table, variants_provenance(context, method), facts)


def outer_layers(run: Run, *, trust_remote_code: bool = False) -> pd.DataFrame:
    """Input embedding and head of the run's model (`outer_table`), from its config alone."""
    # Only here: jobs that make the variants of blocks would spend more time on importing transformers than on a block.
    from evopress.models.skeleton import load_config, skeleton_of
    from evopress.models.structure import outer_table

    config = load_config(run.model, trust_remote_code=trust_remote_code)
    model = skeleton_of(config, torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return outer_table(model)


Hessians = Callable[[str], Tensor]
"""Gives X^T X of an input group, [columns, columns]."""


def _hessians(run: Run, block: int | str) -> tuple[Hessians, dict[str, object]]:
    """The Hessians of a block, and what they were made of."""
    path = run.hessian(block)
    manifest = check_tensors(path)
    calibrated = Provenance(**manifest["provenance"])
    require_same_model(run, calibrated, path)
    facts = {
        "hessians": json.loads(calibrated.settings),
        "tokens": manifest["facts"].get("tokens"),
        "hessian_digests": manifest["tensors"],  # the settings do not tell what a file of text says
    }
    return lambda group: read_tensors(path, [group])[group], facts


def _given_hessians(run: Run, name: str, method: LayerMethod, block: int) -> tuple[Hessians, dict[str, object]]:
    """What the method has in their place, and the files that it comes from."""
    try:
        given = method.given_hessians(run.model, read_table(run.layers, LAYERS), block)
    except ConfigError as error:
        raise ConfigError(f"variants.{name}.{error}") from error
    return given.__getitem__, _digests(method)


def _digests(method: LayerMethod) -> dict[str, object]:
    """What Hessians were made of that the user gives."""
    return {"hessians": {key: sha256(Path(path)) for key, path in method.files().items()}}


def variants_provenance(context: StageContext, method: LayerMethod) -> Provenance:
    """What makes the variants of all blocks."""
    return Provenance("variants", method.model_dump_json(), read_model_fingerprint(context.run), key=context.key)


def included_layers(run: Run, name: str, method: LayerMethod, block: int) -> pd.DataFrame:
    """Rows of the table of layers that belong to ``block`` and match no pattern of ``exclude``.

    Raises:
        ArtifactError: the table is missing, damaged, of another model, or has no such block.
        CompressionError: a layer of the block cannot have the levels.
        ConfigError: a pattern matches no layer of the whole model.
    """
    require_same_model(run, read_provenance(run.layers), run.layers)
    layers = read_table(run.layers, LAYERS)
    if block not in set(layers["block"]):
        raise ArtifactError(f"{run.layers}: has no block {block}; the model has {layers['block'].max() + 1} blocks")
    for pattern in method.exclude:
        names = list(layers["name"])
        if method.compresses_embedding and not any(fnmatchcase(name, pattern) for name in names):
            names += list(outer_layers(run)["name"])
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"variants.{name}.exclude: {pattern!r} matches no layer; names look like {layers['name'].iloc[0]!r}"
            )
    included = layers[[not method.excludes(layer) for layer in layers["name"]]]
    own = included[included["block"] == block]
    # Only whether they can have the levels is asked here; that does not depend on the bytes of their weights.
    method.check(layer_shapes(own, itemsize=0), layer_shapes(included, itemsize=0))
    return own


def compress_layers(
    context: StageContext,
    description: str,
    method: LayerMethod,
    layers: pd.DataFrame,
    hessian: Callable[[str], Tensor],
    prepare: Callable[[str, Mapping[str, Tensor]], tuple[LayerMethod, Mapping[str, Tensor]]] | None = None,
) -> list[Variant]:
    """All variants of some layers, one input group after the other.

    Args:
        context: gives the weights, the device and the memory.
        description: what the progress bar says.
        method: what is to be done.
        layers: rows of the LAYERS schema.
        hessian: gives the Hessian of an input group.
        prepare: gives the method and the weights that an input group is compressed with, in place of ``method`` and the
            weights of its layers.

    Raises:
        CompressionError: a layer cannot be compressed as asked; the message names it.
        ModelError: a weight cannot be read.
    """
    device, checkpoint = context.device, Checkpoint(context.run.model)
    variants: list[Variant] = []
    seconds = 0.0
    with progress(description, len(layers), "layers") as bar:
        for group, members in layers.groupby("input_group", sort=False):
            weights = _weights(checkpoint, members, device)
            own = hessian(str(group)).to(device)
            start = time.perf_counter()
            used, aims = prepare(str(group), weights) if prepare else (method, weights)
            variants += _compress(aims, own, used, members, 1e9 * context.compute.host_gb)
            seconds += time.perf_counter() - start
            bar.advance(len(members))
    note(f"{description}: compressed in {seconds:.2f} s, apart from reading and writing")
    return variants


def _weights(checkpoint: Checkpoint, members: pd.DataFrame, device: torch.device) -> dict[str, Tensor]:
    """Weights by the layer's name inside the block.

    Raises:
        CompressionError: a weight is not finite, or not of the shape that the table of layers says.
    """
    read = checkpoint.read([f"{layer}.weight" for layer in members["name"]], device=device)
    weights = {}
    for row in members.itertuples():
        weight = read[f"{row.name}.weight"]
        if weight.shape != (row.rows, row.columns):
            raise CompressionError(f"{row.name}: weight {list(weight.shape)}, expected {[row.rows, row.columns]}")
        if not bool(torch.isfinite(weight).all()):
            raise CompressionError(f"{row.name}: NaN or infinity in the weights; fetch the model again or exclude it")
        weights[str(row.layer)] = weight
    return weights


def _compress(
    weights: Mapping[str, Tensor], hessian: Tensor, method: LayerMethod, members: pd.DataFrame, memory: float
) -> list[Variant]:
    """Compress one input group; errors name its layers, the log tells how well each went."""
    names = ", ".join(members["name"])
    if not bool(torch.isfinite(hessian).all()):
        raise CompressionError(f"{names}: NaN or infinity in the Hessian; delete the Hessians and run again")
    if not bool(hessian.diagonal().any()):
        raise CompressionError(f"{names}: no calibration token reached it; calibrate on more text, or exclude it")
    try:
        variants = method.compress(weights, hessian, memory)
    except CompressionError as error:
        raise CompressionError(f"{names}: {error}") from error
    for row in members.itertuples():
        own = [variant for variant in variants if variant.layer == row.layer]
        errors = ", ".join(f"{variant.level}: {variant.error:.2e}" for variant in own)
        note(f"{row.name}: relative output error by level {errors}; damping {own[0].damping:g}")
    return variants
