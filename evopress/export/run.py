"""The stitched model: the dense checkpoint with the chosen variant of every searched layer in its place, and without
the modules that were dropped.

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
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint
from evopress.artifacts.stitched import file_digests, write_stitched_manifest
from evopress.artifacts.tables import LAYERS, read_table
from evopress.compression.dropped import Dropped, dropped_modules
from evopress.compression.families import of_modules
from evopress.compression.store import VariantStore
from evopress.export.check import check_single_modules
from evopress.export.cut_config import check_cut_config, write_cut_config
from evopress.export.files import copy_companions
from evopress.export.layout import Layout, dense_layout, depth_layout
from evopress.export.shards import Replace, write_weights
from evopress.models.checkpoint import Checkpoint
from evopress.models.skeleton import load_config
from evopress.models.verify import check_model, check_weight
from evopress.search.configuration import read_configuration
from evopress.util.errors import ArtifactError
from evopress.util.progress import progress

SHARD_BYTES = 5_000_000_000
"""What the hub's own tools cut at."""


class Choice(NamedTuple):
    """The variant that takes the place of one stored tensor."""

    variants: str
    block: int
    layer: str
    level: str


def stitch_model(run: Run, search: str, *, shard_bytes: int = SHARD_BYTES, trust_remote_code: bool = False) -> None:
    """Write the Hugging Face folder of a search's configuration, and then its manifest.

    Blocks that lost both modules are gone from it; a module dropped alone stays, with an output projection of zeros.
    The model card is written by `evopress.export.card.write_card`, once the model has been measured.

    Raises:
        ArtifactError: the configuration or a variant is missing, damaged or of another model, or the folder cannot be
            written.
        ModelError: the dense checkpoint is damaged.
        UnsupportedArchitectureError: this architecture cannot do without what was dropped.
    """
    configuration = read_configuration(run, search)
    checkpoint = Checkpoint(run.model)
    dropped = read_dropped(run, configuration)
    layout = stitched_layout(run, checkpoint, dropped, trust_remote_code=trust_remote_code)
    choices = stored_choices(checkpoint, configuration, run.configuration(search))
    replace = replacement(run, choices, layout.zeroed)
    run.stitched_manifest(search).unlink(missing_ok=True)
    with (
        atomic_folder(run.stitched(search)) as folder,
        progress(f"stitch {search}", len(layout.names), "tensors") as bar,
    ):

        def counted(name: str, dense: torch.Tensor) -> torch.Tensor:
            bar.advance()
            return replace(name, dense)

        copy_companions(run.model, folder)
        if dropped and len(dropped.kept) < dropped.blocks:
            write_cut_config(run.model, folder, dropped.kept, trust_remote_code=trust_remote_code)
            check_cut_config(run.model, folder, dropped.kept, trust_remote_code=trust_remote_code)
        write_weights(checkpoint, folder, layout.names, counted, shard_bytes)
        if dropped:
            check_single_modules(folder, dropped, trust_remote_code=trust_remote_code)
        files = file_digests(folder)
    provenance = Provenance("stitch", json.dumps({"shard_bytes": shard_bytes}), read_model_fingerprint(run))
    write_stitched_manifest(run, search, files, provenance)


def read_dropped(run: Run, configuration: pd.DataFrame) -> Dropped | None:
    """What a configuration drops; None where it holds no modules.

    Raises:
        ArtifactError: the table of layers is missing or damaged, or does not know a module.
    """
    if not of_modules(configuration).any():
        return None
    return dropped_modules(configuration, read_table(run.layers, LAYERS))


def stitched_layout(
    run: Run, checkpoint: Checkpoint, dropped: Dropped | None, *, trust_remote_code: bool = False
) -> Layout:
    """Which tensors the stitched checkpoint holds.

    Raises:
        ArtifactError: the table of layers is missing or damaged.
        UnsupportedArchitectureError: a dropped module's output projection cannot be told.
    """
    if dropped is None:
        return dense_layout(checkpoint)
    config = load_config(run.model, trust_remote_code=trust_remote_code)
    layers = read_table(run.layers, LAYERS)
    return depth_layout(checkpoint, layers, dropped, config.get_text_config().hidden_size)


def stored_choices(checkpoint: Checkpoint, configuration: pd.DataFrame, path: Path) -> dict[str, Choice]:
    """Map the stored name of each searched layer's weight to the variant chosen for it.

    Raises:
        ArtifactError: a layer of the configuration (at ``path``) has no weight in the checkpoint, or appears twice.
    """
    choices: dict[str, Choice] = {}
    for row in configuration[~of_modules(configuration)].to_dict("records"):
        stored = checkpoint.stored_name(f"{row['unit']}.weight")
        if stored is None or stored in choices:
            problem = "is no layer of the model" if stored is None else "appears twice"
            raise ArtifactError(f"{path}: unit {row['unit']!r} {problem}; delete it and run the search again")
        choices[stored] = Choice(row["variants"], row["block"], row["layer"], row["level"])
    return choices


def replacement(run: Run, choices: Mapping[str, Choice], zeroed: frozenset[str]) -> Replace:
    """What to store in the place of each dense tensor: zeros, the chosen variant, or the tensor itself.

    Each tensor that goes into the export is compared with its digest.

    Raises:
        ArtifactError: variants or dense weights are missing, damaged or of another model.
    """
    digests = check_model(run)
    stores = {
        name: VariantStore(run, name, verify=True) for name in sorted({choice.variants for choice in choices.values()})
    }

    def replace(name: str, dense: torch.Tensor) -> torch.Tensor:
        if name in zeroed:
            return torch.zeros_like(dense)
        if name in choices:
            return _variant(stores, choices[name], dense)
        return check_weight(run, digests, name, dense)

    return replace


def open_stores(run: Run, choices: Mapping[str, Choice]) -> dict[str, VariantStore]:
    """Variants that are chosen from, by name; each tensor that is read is compared with its digest.

    Raises:
        ArtifactError: variants are missing, damaged or of another model.
    """
    names = sorted({choice.variants for choice in choices.values()})
    return {name: VariantStore(run, name, verify=True) for name in names}


def _variant(stores: Mapping[str, VariantStore], choice: Choice, dense: torch.Tensor) -> torch.Tensor:
    """Unpack a variant into the type of the dense weight that it replaces."""
    weight = stores[choice.variants].weight(choice.block, choice.layer, choice.level, dense.device, dense.dtype)
    if weight.shape != dense.shape:
        raise ArtifactError(
            f"variants {choice.variants!r}: block {choice.block} {choice.layer} level {choice.level} is "
            f"{list(weight.shape)}, the model's layer is {list(dense.shape)}; delete these variants and run again"
        )
    return weight
