"""Memory, disk and work of each stage.

Memory is the peak of one job, host and device together; work counts multiplications and additions of matrix products.
Sizes that hang on text of unknown length are NaN.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from evopress.compression.base import LayerMethod, layer_shapes
from evopress.config.model import FolderModel, HubModel
from evopress.plan.baselines import BaselineSettings, baseline_work
from evopress.plan.judging import device_type
from evopress.plan.search import SearchWork
from evopress.plan.shape import ModelShape
from evopress.search.strategies.dp import DynamicProgramming
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.greedy import Greedy
from evopress.search.strategies.random import RandomSearch
from evopress.workflow.settings import Settings
from evopress.workflow.slices import texts

_TOKEN_BYTES = 4
_SHARD_BYTES = 5e9
"""Most that stitching holds at once."""
_RUN_TOKENS = 4096
"""Tokens that pass a block at once on a CPU."""
_ACTIVATIONS = 16
"""Numbers per token that are live inside a block, in hidden sizes."""
_LOGITS = 1 << 25
"""Logits that evaluation makes at once."""


@dataclass(frozen=True)
class Stage:
    """What a stage needs; sizes in bytes."""

    name: str
    jobs: int
    memory: float = 0.0
    disk: float = 0.0
    tokens: float = 0.0
    """Tokens that pass the model, or are written."""
    flops: float = 0.0
    note: str = ""


def stages(
    settings: Settings, shape: ModelShape, variants: Mapping[str, pd.DataFrame], searches: Mapping[str, SearchWork]
) -> list[Stage]:
    """All stages in the order in which they run.

    Args:
        settings: the run.
        shape: its model.
        variants: table of each database of variants (`Method.table`).
        searches: work of each evolutionary or random search.
    """
    return [
        _model(settings, shape),
        _tokens(settings),
        *_hessians(settings, shape),
        *(_variants(settings, shape, name, table) for name, table in variants.items()),
        *_searches(settings, shape, variants, searches),
        Stage("stitch", len(settings.searches), min(_SHARD_BYTES, shape.bytes), shape.bytes * len(settings.searches)),
        _perplexity(settings, shape),
        Stage("tasks", len(settings.searches) + 1, shape.bytes, note="work depends on the tasks' documents"),
        Stage("report", 1 + len(settings.searches)),
    ]


def sizes_of_text(settings: Settings) -> dict[str, float]:
    """Tokens of each text; NaN where all of a text is taken."""
    return {name: float(text.tokens or math.nan) for name, text in texts(settings).items()}


def hessian_bytes(layers: pd.DataFrame) -> int:
    """Bytes of the Hessians of ``layers``: one float32 matrix for each distinct input of a block."""
    columns = layers.drop_duplicates(["block", "input_group"])["columns"]
    return 4 * int((columns**2).sum())


def _model(settings: Settings, shape: ModelShape) -> Stage:
    part = (shape.outside * shape.itemsize) + shape.block_bytes
    if isinstance(settings.model, FolderModel):
        return Stage("model", 1, part, note="links to the folder")
    if isinstance(settings.model, HubModel):
        return Stage("model", 1, part, shape.bytes, note="in the hub's cache, linked")
    whole = (shape.outside + shape.inside) * (4 + shape.itemsize)
    return Stage("model", 1, whole, shape.bytes, note="dequantized in float32")


def _tokens(settings: Settings) -> Stage:
    sizes = sizes_of_text(settings)
    total = sum(sizes.values())
    return Stage("tokens", len(sizes), disk=total * _TOKEN_BYTES, tokens=total, note="disk before compression")


def _forward(settings: Settings, shape: ModelShape, dataset: str, *, logits: int) -> tuple[float, float]:
    """Tokens of a text, and operations to run them through the model and ``logits`` times the head."""
    text = texts(settings)[dataset]
    tokens = sizes_of_text(settings)[dataset]
    blocks = shape.blocks * shape.block_flops(text.sequence_length)
    return tokens, tokens * (blocks + logits * shape.head_flops)


def _running(shape: ModelShape, tokens: float, states: int = 1) -> float:
    """Memory to take ``tokens`` through the model, one block at a time, with their hidden states on the host."""
    numbers = shape.outside + _RUN_TOKENS * _ACTIVATIONS * shape.hidden_size + states * tokens * shape.hidden_size
    return numbers * shape.itemsize + shape.block_bytes


def _hessians(settings: Settings, shape: ModelShape) -> Iterator[Stage]:
    if not _needs_hessians(settings):
        return
    shards = settings.hessians.shards
    tokens, flops = _forward(settings, shape, "calibration", logits=0)
    total = hessian_bytes(shape.layers)
    first = shape.layers[shape.layers["block"] == 0]
    copies = hessian_bytes(first) + 2 * 4 * int(first["columns"].max()) ** 2
    memory = _running(shape, tokens / shards) + copies
    # Only the upper triangle is accumulated: one multiplication and addition for each half of the matrix.
    yield Stage("hessians", shards, memory, total * shards, tokens, flops + tokens * total / 4)
    if shards > 1:
        yield Stage("hessian sums", shape.blocks, 2 * hessian_bytes(first), total)


def _needs_hessians(settings: Settings) -> bool:
    """Whether anything rests on the Hessians of the dense model; chains make their own."""
    dense = any(method.needs_hessians for method in settings.variants.values())
    return dense or any(search.needs_hessians for search in settings.searches.values())


def _variants(settings: Settings, shape: ModelShape, name: str, table: pd.DataFrame) -> Stage:
    method = settings.variants[name]
    if not isinstance(method, LayerMethod):
        return Stage(f"variants {name}", 1, note="only a list of modules")
    own = table[table["block"] == table["block"].min()]
    layers = shape.layers[shape.layers["name"].isin(own["name"])]
    sweep = flops = 0.0
    for _, members in layers.groupby("input_group", sort=False):
        group = layer_shapes(members, shape.itemsize)
        sweep = max(sweep, method.peak_bytes(group, settings.compute.memory_gb * 1e9))
        flops += method.operations(group)
    memory, total = sweep + float(own["bytes"].sum()), flops * shape.blocks
    disk = float(table["bytes"].sum())
    if not method.sequential:
        return Stage(f"variants {name}", shape.blocks, memory, disk, flops=total)
    tokens, forward = _forward(settings, shape, "calibration", logits=0)
    hessians = hessian_bytes(shape.layers)
    memory += _running(shape, tokens) + hessians / shape.blocks
    # Each block runs twice, to be observed and compressed; the last job's Hessians are never on disk.
    total += 2 * forward + tokens * hessians / 4
    return Stage(f"variants {name}", shape.blocks, memory, disk, tokens, total, note="one block after the other")


def _searches(
    settings: Settings, shape: ModelShape, variants: Mapping[str, pd.DataFrame], searches: Mapping[str, SearchWork]
) -> Iterator[Stage]:
    for name, search in settings.searches.items():
        if isinstance(search, Evolution | RandomSearch):
            yield _generations(name, settings, searches[name])
        elif isinstance(search, BaselineSettings):
            yield _baseline(name, search, settings, shape, variants[search.variants])
        else:
            memory = float(shape.block_bytes) * 4 if search.needs_hessians else 0.0
            yield Stage(f"search {name}", 1, memory, note="no candidate is run")


def _generations(name: str, settings: Settings, work: SearchWork) -> Stage:
    tokens = float(work.candidate_tokens * work.generations)
    flops = work.start_flops + work.flops * work.generations
    note = "" if work.kept else "weights are brought in again in each pass"
    memory = work.memory_bytes + work.teacher_bytes
    return Stage(f"search {name}", settings.compute.processes, memory, 0.0, tokens, flops, note)


def _baseline(
    name: str, search: BaselineSettings, settings: Settings, shape: ModelShape, variants: pd.DataFrame
) -> Stage:
    jobs = max(1, search.workers(settings.compute.processes))
    if isinstance(search, DynamicProgramming) and search.errors == "table":
        return Stage(f"search {name}", jobs, note="no candidate is run")
    device = device_type(settings.compute.device)
    text, gigabytes = settings.data.search, settings.compute.memory_gb
    work = baseline_work(shape, variants, search, text, gigabytes, device, f"searches.{name}")
    note = "at most" if isinstance(search, Greedy) else ""
    return Stage(f"search {name}", jobs, work.memory_bytes, 0.0, float(work.candidate_tokens), work.flops, note)


def _perplexity(settings: Settings, shape: ModelShape) -> Stage:
    models = len(settings.searches) + 1
    tokens = flops = 0.0
    for dataset in settings.data.evaluation:
        count, dense = _forward(settings, shape, dataset, logits=1)
        compressed = _forward(settings, shape, dataset, logits=2)[1]
        tokens += count * models
        flops += dense + compressed * (models - 1)
    sizes = [sizes_of_text(settings)[dataset] for dataset in settings.data.evaluation]
    memory = _running(shape, max(sizes), states=2) + _LOGITS * (2 * shape.itemsize + 8)
    return Stage("perplexity", models, memory, sum(sizes) * shape.hidden_size * shape.itemsize, tokens, flops)
