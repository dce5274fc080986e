"""A prepared run of a tiny model, ready to be searched, for the tests of the search stage."""

from pathlib import Path
from typing import Any

import torch
from finished_run import BLOCKS, make_results, provenance, write_tokens

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import LAYERS as LAYER_SCHEMA
from evopress.artifacts.tables import PROGRESS, read_table, write_table
from evopress.artifacts.tensors import write_tensors
from evopress.compression.methods.gptq import Gptq
from evopress.compression.stage import make_variants
from evopress.config.context import ComputeSettings, StageContext
from evopress.models.blockwise import BlockwiseModel
from evopress.models.structure import layer_table
from evopress.search.base import Strategy
from evopress.search.effects import measure_effects
from evopress.search.run import run_search
from evopress.search.strategies.evolution import Evolution

COMPUTE = ComputeSettings(device="cpu", memory_gb=0.01)
SETTINGS = Evolution(
    variants="gptq",
    target=3.0,
    generations=6,
    offspring=6,
    survivors=(3, 1),
    tokens=(18, 48),
    initial_candidates=4,
    initial_tokens=12,
)
MIXED = SETTINGS.model_copy(update={"target": 2.7, "seed": 3})


def prepare(folder: Path, bits: tuple[int, ...] = (2, 3, 4), dtype: torch.dtype = torch.float32) -> Run:
    """A tiny model with search tokens and real variants, without any search."""
    run = make_results(folder, dtype=dtype)
    write_tokens(run, "search", sequences=6)
    model = BlockwiseModel.from_folder(run.model, torch.device("cpu"))
    layers = layer_table(model.model)
    write_table(layers, run.layers, LAYER_SCHEMA, provenance())
    for block in range(BLOCKS):
        rows = layers[layers["block"] == block].drop_duplicates("input_group")
        hessians = {row.input_group: torch.eye(row.columns) for row in rows.itertuples()}
        write_tensors(hessians, run.hessian(block), provenance(), {"tokens": 1})
        make_variants(StageContext(run, COMPUTE), "gptq", Gptq(bits=bits, group_size=8), [block])
    return run


def search_with_effects(context: StageContext, name: str, strategy: Strategy) -> None:
    """A search, after what it starts from has been measured."""
    if (effects := strategy.effects()) is not None:
        measure_effects(context, effects)
    run_search(context, name, strategy)


def artifacts(run: Run, name: str = "q") -> tuple[bytes, bytes]:
    return run.configuration(name).read_bytes(), run.trace(name).read_bytes()


def progress(run: Run, name: str = "q") -> list[dict[str, Any]]:
    """Rows of the progress, but for the seconds, which no two searches share."""
    return read_table(run.progress(name), PROGRESS).drop(columns="seconds").map(str).to_dict("records")


def fresh(run: Run, name: str | Path) -> Run:
    """The same run under a root of its own, so that searches do not meet; beside it if ``name`` is relative."""
    own = Run(run.root.parent / name)
    own.root.mkdir()
    for path in run.root.iterdir():
        (own.root / path.name).symlink_to(path.resolve())
    return own
