"""A run on disk whose configuration drops modules, and the plain model that it must equal."""

import json
from collections.abc import Collection, Iterable
from contextlib import contextmanager

import pandas as pd
import torch
from finished_run import FINGERPRINT, provenance
from torch import nn

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import CONFIGURATION, LAYERS, MODULES, write_table
from evopress.models.blockwise import BlockwiseModel
from evopress.models.structure import layer_table

SEARCH = {"strategy": "evolution", "target": 1, "variants": "depth", "fitness": "kl"}
BLOCKS = 3


def write_depth_model(run: Run, model: nn.Module) -> None:
    """Model folder, manifest and table of layers, as the model stage leaves them."""
    model.save_pretrained(run.model)
    manifest = {"fingerprint": FINGERPRINT, "source": {"source": "hub", "id": "someone/tiny", "revision": "main"}}
    run.model_manifest.write_text(json.dumps(manifest))
    layers = layer_table(BlockwiseModel.from_folder(run.model, torch.device("cpu")).model)
    write_table(layers, run.layers, LAYERS, provenance())


def write_depth_configuration(
    run: Run, search: str, dropped: Collection[tuple[int, str]], itemsize: int = 4, excluded: Iterable = ()
) -> pd.DataFrame:
    """A configuration that keeps all modules but those ``dropped``; the excluded ones are not listed."""
    layers = pd.read_parquet(run.layers)
    rows = []
    for (block, kind), group in layers.groupby(["block", "module"]):
        if (block, kind) in excluded:
            continue
        prefix = group["name"].iloc[0].removesuffix(group["layer"].iloc[0])
        kept = (block, kind) not in dropped
        parameters = int(group["parameters"].sum())
        level = ("keep", 0.0) if kept else ("drop", 1.0)
        rows.append(
            (
                prefix + kind,
                block,
                kind,
                "depth",
                "modules",
                *level,
                int(kept),
                parameters,
                kept * itemsize * parameters,
            )
        )
    frame = pd.DataFrame(rows, columns=CONFIGURATION.names)
    write_table(frame, run.configuration(search), CONFIGURATION, provenance(SEARCH))
    table = pd.DataFrame(columns=MODULES.names)
    write_table(table, run.module_table("depth"), MODULES, provenance({"method": "drop", "unit": "module"}))
    return frame


@contextmanager
def without(model: nn.Module, dropped: Collection[tuple[int, str]]):
    """The plain transformers model whose dropped modules give zeros; blocks without both hand on their input."""
    inner = getattr(model.base_model, "decoder", model.base_model)
    hooks = []
    for block, kind in dropped:
        layer = inner.layers[block]
        if {(block, "attn"), (block, "mlp")} <= set(dropped):
            hooks.append(layer.register_forward_hook(_hand_on, with_kwargs=True))
        elif kind == "attn":
            attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
            hooks.append(attention.register_forward_hook(lambda _, args, out: (torch.zeros_like(out[0]), *out[1:])))
        else:
            last = layer.mlp if hasattr(layer, "mlp") else layer.fc2
            hooks.append(last.register_forward_hook(lambda _, args, out: torch.zeros_like(out)))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _hand_on(_, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
