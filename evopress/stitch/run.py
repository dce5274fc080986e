"""The stitched model: the dense checkpoint with the chosen variant of every searched layer in its place.

Weights are dequantized into the type of the dense checkpoint, so that any program that loads the original loads this
model too, without code of ours. Nothing here knows how the configuration was found.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from evopress.artifacts.atomic import atomic_folder
from evopress.artifacts.configuration import read_configuration
from evopress.artifacts.paths import Results
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.stitched import file_digests, write_stitched_manifest
from evopress.artifacts.variants import VariantStore
from evopress.errors import ArtifactError
from evopress.models.checkpoint import Checkpoint
from evopress.progress import progress
from evopress.stitch.files import copy_companions
from evopress.stitch.shards import write_weights

SHARD_BYTES = 5_000_000_000
"""What the hub's own tools cut at."""


class Choice(NamedTuple):
    """The variant that takes the place of one stored tensor."""

    variants: str
    block: int
    layer: str
    level: str


def stitch_model(results: Results, search: str, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the Hugging Face folder of a search's configuration, and then its manifest.

    The model card is written by `evopress.stitch.card.write_card`, once the model has been measured.

    Raises:
        ArtifactError: the configuration or a variant is missing, damaged or of another model, or the folder cannot be
            written.
        ModelError: the dense checkpoint is damaged.
    """
    configuration = read_configuration(results, search)
    checkpoint = Checkpoint(results.model)
    choices = stored_choices(checkpoint, configuration, results.configuration(search))
    stores = {name: VariantStore(results, name) for name in sorted(set(configuration["variants"]))}
    results.stitched_manifest(search).unlink(missing_ok=True)
    with (
        atomic_folder(results.stitched(search)) as folder,
        progress(f"stitch {search}", len(checkpoint.names()), "tensors") as bar,
    ):

        def replace(name: str, dense: torch.Tensor) -> torch.Tensor:
            bar.advance()
            return _variant(stores, choices[name], dense) if name in choices else dense

        copy_companions(results.model, folder)
        write_weights(checkpoint, folder, replace, shard_bytes)
        files = file_digests(folder)
    provenance = Provenance("stitch", json.dumps({"shard_bytes": shard_bytes}), read_model_fingerprint(results))
    write_stitched_manifest(results, search, files, provenance)


def stored_choices(checkpoint: Checkpoint, configuration: pd.DataFrame, path: Path) -> dict[str, Choice]:
    """Map the stored name of each searched layer's weight to the variant chosen for it.

    Raises:
        ArtifactError: a unit of the configuration (at ``path``) has no weight in the checkpoint, or appears twice.
    """
    choices: dict[str, Choice] = {}
    for row in configuration.to_dict("records"):
        stored = checkpoint.stored_name(f"{row['unit']}.weight")
        if stored is None or stored in choices:
            problem = "is no layer of the model" if stored is None else "appears twice"
            raise ArtifactError(f"{path}: unit {row['unit']!r} {problem}; delete it and run the search again")
        choices[stored] = Choice(row["variants"], row["block"], row["layer"], row["level"])
    return choices


def _variant(stores: Mapping[str, VariantStore], choice: Choice, dense: torch.Tensor) -> torch.Tensor:
    """Unpack a variant into the type of the dense weight that it replaces."""
    weight = stores[choice.variants].weight(choice.block, choice.layer, choice.level, dense.device, dense.dtype)
    if weight.shape != dense.shape:
        raise ArtifactError(
            f"variants {choice.variants!r}: block {choice.block} {choice.layer} level {choice.level} is "
            f"{list(weight.shape)}, the model's layer is {list(dense.shape)}; delete these variants and run again"
        )
    return weight
