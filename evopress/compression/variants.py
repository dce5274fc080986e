"""The variants stage: all levels of all linear layers of one block, from its Hessians and its weights."""

import json
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import pandas as pd
import torch
from torch import Tensor

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import LAYERS, VARIANTS, read_provenance, read_table, write_table
from evopress.artifacts.tensors import check_tensors, read_tensors, write_tensors
from evopress.compression.compress import Variant, compress
from evopress.compression.packing import tensor_name
from evopress.compression.settings import CompressionSettings, GptqSettings
from evopress.config.compute import ComputeSettings
from evopress.config.group_size import check_group_size
from evopress.models.checkpoint import Checkpoint
from evopress.models.verify import check_model
from evopress.util.device import resolve_device
from evopress.util.errors import ArtifactError, CompressionError, ConfigError
from evopress.util.progress import log, progress


def make_variants(run: Run, name: str, settings: CompressionSettings, compute: ComputeSettings, block: int) -> None:
    """Compress the linear layers of one block to every level; write the packed tensors and their table.

    Reads the block's Hessians and weights by name; the model itself is not built. The table is written last.

    Raises:
        ArtifactError: Hessians or layers are missing, damaged or of another model; the disk is full.
        CompressionError: a layer cannot be compressed as asked; the message names it.
        ConfigError: a pattern of ``exclude`` matches no layer, or the device is not there.
        ModelError: a weight cannot be read.
    """
    layers = included_layers(run, name, settings, block)
    check_model(run)
    manifest = check_tensors(run.hessian(block))
    calibrated = Provenance(**manifest["provenance"])
    require_same_model(run, calibrated, run.hessian(block))

    def hessian(group: str) -> Tensor:
        """X^T X of an input group, [columns, columns]."""
        return read_tensors(run.hessian(block), [group])[group]

    variants = compress_layers(run, f"variants {name}, block {block}", settings, compute, layers, hessian)
    facts = {"hessians": json.loads(calibrated.settings), "tokens": manifest["facts"].get("tokens")}
    write_variants(run, name, block, variants, layers, variants_provenance(run, settings), facts)


def variants_provenance(run: Run, settings: CompressionSettings) -> Provenance:
    """What makes the variants of all blocks."""
    return Provenance("variants", settings.model_dump_json(), read_model_fingerprint(run))


def included_layers(run: Run, name: str, settings: CompressionSettings, block: int) -> pd.DataFrame:
    """Rows of the table of layers that belong to ``block`` and match no pattern of ``exclude``.

    Raises:
        ArtifactError: the table is missing, damaged, of another model, or has no such block.
        CompressionError: the group size does not divide a layer of the block.
        ConfigError: a pattern matches no layer of the whole model.
    """
    require_same_model(run, read_provenance(run.layers), run.layers)
    layers = read_table(run.layers, LAYERS)
    if block not in set(layers["block"]):
        raise ArtifactError(f"{run.layers}: has no block {block}; the model has {layers['block'].max() + 1} blocks")
    for pattern in settings.exclude:
        if not any(fnmatchcase(layer, pattern) for layer in layers["name"]):
            raise ConfigError(
                f"variants.{name}.exclude: {pattern!r} matches no layer; names look like {layers['name'].iloc[0]!r}"
            )
    excluded = layers["name"].map(lambda layer: any(fnmatchcase(layer, pattern) for pattern in settings.exclude))
    included = layers[~excluded.astype(bool)]
    own = included[included["block"] == block]
    if isinstance(settings, GptqSettings):
        _check_groups(settings.group_size, own, included)
    return own


def _check_groups(group_size: int | None, layers: pd.DataFrame, all_layers: pd.DataFrame) -> None:
    """Check the group size before any work is done; what the error offers divides the layers of all blocks."""
    everywhere = all_layers["columns"].unique().tolist()
    for name, columns in zip(layers["name"], layers["columns"].tolist(), strict=True):
        try:
            check_group_size(group_size, columns, everywhere)
        except CompressionError as error:
            raise CompressionError(f"{name}: {error}") from error


def compress_layers(
    run: Run,
    description: str,
    settings: CompressionSettings,
    compute: ComputeSettings,
    layers: pd.DataFrame,
    hessian: Callable[[str], Tensor],
) -> list[Variant]:
    """All variants of some layers, one input group after the other.

    Args:
        run: gives the weights.
        description: what the progress bar says.
        settings: method and levels.
        compute: device and memory.
        layers: rows of the LAYERS schema.
        hessian: gives the Hessian of an input group.

    Raises:
        CompressionError: a layer cannot be compressed as asked; the message names it.
        ModelError: a weight cannot be read.
    """
    device, checkpoint = resolve_device(compute.device), Checkpoint(run.model)
    variants: list[Variant] = []
    seconds = 0.0
    with progress(description, len(layers), "layers") as bar:
        for group, members in layers.groupby("input_group", sort=False):
            weights = _weights(checkpoint, members, device)
            own = hessian(str(group)).to(device)
            start = time.perf_counter()
            variants += _compress(weights, own, settings, members, compute.memory_gb * 1e9)
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
    weights: Mapping[str, Tensor], hessian: Tensor, settings: CompressionSettings, members: pd.DataFrame, memory: float
) -> list[Variant]:
    """Compress one input group; errors name its layers, the log tells how well each went."""
    names = ", ".join(members["name"])
    if not bool(torch.isfinite(hessian).all()):
        raise CompressionError(f"{names}: NaN or infinity in the Hessian; delete the Hessians and run again")
    if not bool(hessian.diagonal().any()):
        raise CompressionError(f"{names}: no calibration token reached it; calibrate on more text, or exclude it")
    try:
        variants = compress(weights, hessian, settings, memory)
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
    layers: pd.DataFrame,
    provenance: Provenance,
    facts: Mapping[str, object],
) -> None:
    """Write tensors, then the table: an old table must not stand beside new tensors.

    Raises:
        ArtifactError: the files cannot be written.
    """
    table = run.variant_table(name, block)
    table.unlink(missing_ok=True)
    run.module_table(name).unlink(missing_ok=True)  # of another method under this name
    tensors = {
        tensor_name(variant.layer, variant.level, part): tensor
        for variant in variants
        for part, tensor in variant.parts.items()
    }
    write_tensors(tensors, run.variant_tensors(name, block), provenance, facts)
    write_table(_table(variants, layers, block), table, VARIANTS, provenance)


def _table(variants: list[Variant], layers: pd.DataFrame, block: int) -> pd.DataFrame:
    """Rows of the VARIANTS schema."""
    names = dict(zip(layers["layer"], layers["name"], strict=True))
    return pd.DataFrame(
        [
            {
                "block": block,
                "layer": variant.layer,
                "name": names[variant.layer],
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
