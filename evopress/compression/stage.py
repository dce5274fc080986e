"""The variants stage: all levels of all linear layers of one block, from its Hessians and its weights."""

import json
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import LAYERS, VARIANTS, read_provenance, read_table, write_table
from evopress.artifacts.tensors import check_tensors, read_tensors, write_tensors
from evopress.compression.base import LayerMethod, Variant, layer_shapes
from evopress.compression.store import tensor_name
from evopress.config.context import StageContext
from evopress.models.checkpoint import Checkpoint
from evopress.models.verify import check_model
from evopress.util.errors import ArtifactError, CompressionError, ConfigError
from evopress.util.progress import log, progress


def make_variants(context: StageContext, name: str, method: LayerMethod, block: int) -> None:
    """Compress the linear layers of one block to every level; write the packed tensors and their table.

    Reads the block's Hessians and weights by name; the model itself is not built. The table is written last.

    Raises:
        ArtifactError: Hessians or layers are missing, damaged or of another model; the disk is full.
        CompressionError: a layer cannot be compressed as asked; the message names it.
        ConfigError: a pattern of ``exclude`` matches no layer, or the device is not there.
        ModelError: a weight cannot be read.
    """
    run = context.run
    layers = included_layers(run, name, method, block)
    check_model(run)
    manifest = check_tensors(run.hessian(block))
    calibrated = Provenance(**manifest["provenance"])
    require_same_model(run, calibrated, run.hessian(block))

    def hessian(group: str) -> Tensor:
        """X^T X of an input group, [columns, columns]."""
        return read_tensors(run.hessian(block), [group])[group]

    variants = compress_layers(context, f"variants {name}, block {block}", method, layers, hessian)
    facts = {"hessians": json.loads(calibrated.settings), "tokens": manifest["facts"].get("tokens")}
    table = variant_table(variants, layers, method, block)
    write_variants(run, name, block, variants, table, variants_provenance(context, method), facts)


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
        if not any(fnmatchcase(layer, pattern) for layer in layers["name"]):
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
            variants += _compress(aims, own, used, members, context.memory)
            seconds += time.perf_counter() - start
            bar.advance(len(members))
    log.info("%s: compressed in %.2f s, apart from reading and writing", description, seconds)
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
        log.info("%s: relative output error by level %s; damping %g", row.name, errors, own[0].damping)
    return variants


def write_variants(
    run: Run,
    name: str,
    block: int,
    variants: list[Variant],
    table: pd.DataFrame,
    provenance: Provenance,
    facts: Mapping[str, object],
) -> None:
    """Write tensors, then the table (VARIANTS schema): an old table must not stand beside new tensors.

    Raises:
        ArtifactError: the files cannot be written.
    """
    run.module_table(name).unlink(missing_ok=True)  # of another method under this name
    write_packed(run.variant_tensors(name, block), run.variant_table(name, block), variants, table, provenance, facts)


def write_packed(
    tensors: Path,
    path: Path,
    variants: list[Variant],
    table: pd.DataFrame,
    provenance: Provenance,
    facts: Mapping[str, object],
) -> None:
    """The same at the paths ``tensors`` and, for the table, ``path``."""
    path.unlink(missing_ok=True)
    named = {
        tensor_name(variant.layer, variant.level, part): tensor
        for variant in variants
        for part, tensor in variant.parts.items()
    }
    write_tensors(named, tensors, provenance, facts)
    write_table(table, path, VARIANTS, provenance)


def variant_table(variants: list[Variant], layers: pd.DataFrame, method: LayerMethod, block: int) -> pd.DataFrame:
    """Table with the VARIANTS schema.

    Args:
        variants: of layers of one block.
        layers: rows of the LAYERS schema.
        method: that has made the variants.
        block: index of the block.
    """
    names = dict(zip(layers["layer"], layers["name"], strict=True))
    return pd.DataFrame(
        [
            {
                "block": block,
                "layer": variant.layer,
                "name": names[variant.layer],
                "family": method.family.name,
                "level": variant.level,
                "value": variant.value,
                "cost": variant.cost,
                "parameters": variant.parameters,
                "bits_per_weight": 8 * variant.bytes / variant.parameters,
                "bytes": variant.bytes,
                "error": variant.error,
                "damping": variant.damping,
                "format": variant.format,
            }
            for variant in variants
        ],
        columns=VARIANTS.names,
    )
