"""Memory, disk and work of each stage.

Memory is the peak of one job, host and device together; work counts multiplications and additions of matrix products.
Sizes that hang on text of unknown length are NaN. What a stage does at once is told by the code that does it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from evopress.compression.base import Method, layer_shapes
from evopress.compression.hessian import TOKENS_AT_ONCE
from evopress.config.data import TextSettings
from evopress.config.model import FolderModel, HubModel
from evopress.evaluation.perplexity import LOGITS, RUN_TOKENS
from evopress.export.exporters.huggingface import SHARD_BYTES
from evopress.plan.searches import SearchWork
from evopress.plan.shape import ModelShape
from evopress.search.engine.memory import ACTIVATION_WIDTH, score_bytes
from evopress.workflow.settings import Settings
from evopress.workflow.slices import texts

_TOKEN_BYTES = 4


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
    settings: Settings,
    shape: ModelShape,
    here: ModelShape,
    variants: Mapping[str, pd.DataFrame],
    searches: Mapping[str, SearchWork],
) -> Iterator[Stage]:
    """All stages in the order in which they run.

    Args:
        settings: the run.
        shape: its model.
        here: the same in the type that the device of the settings works in.
        variants: table of each database of variants (`Method.table`).
        searches: work of each search.
    """
    models = len(settings.searches)
    sizes = {name: tokens_of(text) for name, text in texts(settings).items()}
    total = sum(sizes.values())
    yield _model(settings, shape)
    yield Stage("tokens", len(sizes), disk=total * _TOKEN_BYTES, tokens=total, note="disk before compression")
    yield from _hessians(settings, here)
    for name, table in variants.items():
        yield from _variants(settings, here, name, table)
    for name, work in searches.items():
        yield _search(settings, here, name, work)
    for name in searches:
        if settings.searches[name].polishes:
            yield _polish(settings, here, name, variants[settings.searches[name].variants])
    yield Stage("stitch", models, min(SHARD_BYTES, shape.bytes), shape.bytes * models)
    yield _perplexity(settings, here)
    yield Stage("tasks", models + 1, here.bytes, note="work depends on the tasks' documents")
    if measured := settings.in_runtime():
        yield _runtime(settings, shape, len(measured))
    yield Stage("report", models + 1)


def tokens_of(text: TextSettings) -> float:
    """NaN where all of a text is taken."""
    return float(text.tokens or math.nan)


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


def _running(shape: ModelShape, text: TextSettings, at_once: int, states: float) -> float:
    """Memory to take a text through the model block by block, with hidden states of so many tokens on the host."""
    width = ACTIVATION_WIDTH * max(at_once, text.sequence_length)
    return (shape.outside + (width + states) * shape.hidden_size) * shape.itemsize + shape.block_bytes


def _hessians(settings: Settings, shape: ModelShape) -> Iterator[Stage]:
    of_variants = any(
        method.needs_hessians or (method.sequential and method.compresses_embedding)
        for method in settings.variants.values()
    )
    if not of_variants and not any(search.needs_hessians for search in settings.searches.values()):
        return
    text, shards = settings.data.calibration, settings.hessians.shards
    total = hessian_bytes(shape.layers) + 4 * shape.hidden_size**2  # the last is that of the head's input
    first, tokens = shape.layers[shape.layers["block"] == 0], tokens_of(text)
    copies = hessian_bytes(first) + 2 * 4 * int(first["columns"].max()) ** 2
    memory = _running(shape, text, TOKENS_AT_ONCE, tokens / shards) + copies
    # Only the upper triangle is accumulated: one multiplication and addition for each half of the matrix.
    work = tokens * (shape.blocks * shape.block_flops(text.sequence_length) + total / 4)
    yield Stage("hessians", shards, memory, total * shards, tokens, work)
    if shards > 1:
        yield Stage("hessian sums", shape.blocks + 1, 2 * hessian_bytes(first), total)


def _variants(settings: Settings, shape: ModelShape, name: str, table: pd.DataFrame) -> Iterator[Stage]:
    method = settings.variants[name]
    if not method.per_block:
        yield Stage(f"variants {name}", 1, note="only a list")
        return
    yield _variants_of_blocks(settings, shape, name, _inside(shape, table))
    if method.compresses_embedding:
        outer = table.drop(_inside(shape, table).index)
        memory, flops = _compressing(settings, shape, method, shape.outer[shape.outer["name"].isin(outer["name"])])
        disk = float(outer["bytes"].sum())
        yield Stage(f"variants {name}, embedding", 1, memory + disk, disk, flops=flops, note="with the head")


def _variants_of_blocks(settings: Settings, shape: ModelShape, name: str, table: pd.DataFrame) -> Stage:
    method, text = settings.variants[name], settings.data.calibration
    memory, flops = _compressing_blocks(settings, shape, method, table)
    memory += float(table[table["block"] == table["block"].max() // 2]["bytes"].sum())
    disk = float(table["bytes"].sum())
    if not method.sequential:
        return Stage(f"variants {name}", shape.blocks, memory, disk, flops=flops)
    tokens, hessians = tokens_of(text), hessian_bytes(shape.layers)
    memory += _running(shape, text, TOKENS_AT_ONCE, tokens) + hessians / shape.blocks
    # Each block runs twice, to be observed and compressed; its Hessians are never on disk.
    flops += tokens * (2 * shape.blocks * shape.block_flops(text.sequence_length) + hessians / 4)
    return Stage(f"variants {name}", shape.blocks, memory, disk, tokens, flops, note="one block after the other")


def _search(settings: Settings, shape: ModelShape, name: str, work: SearchWork) -> Stage:
    search, whole = settings.searches[name], work.whole
    if not work.memory_bytes:
        memory = 4.0 * shape.inside / shape.blocks + hessian_bytes(shape.layers) / shape.blocks
        return Stage(f"search {name}", 1, memory * search.needs_hessians, note="no candidate is run")
    note = "" if work.kept else "weights are brought in again in each pass"
    memory = work.memory_bytes + work.dense_bytes
    jobs = max(1, search.workers(settings.compute.processes))
    return Stage(f"search {name}", jobs, memory, 0.0, whole.candidate_tokens, whole.flops, note)


def _inside(shape: ModelShape, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table of variants that are of layers of blocks."""
    return table[table["block"].between(0, shape.blocks - 1)]


def _compressing_blocks(
    settings: Settings, shape: ModelShape, method: Method, table: pd.DataFrame
) -> tuple[float, float]:
    """Memory to make all variants of a block (without them), and the work for those of all blocks."""
    own = table[table["block"] == table["block"].min()]
    memory, flops = _compressing(settings, shape, method, shape.layers[shape.layers["name"].isin(own["name"])])
    return memory, shape.blocks * flops


def _compressing(settings: Settings, shape: ModelShape, method: Method, layers: pd.DataFrame) -> tuple[float, float]:
    """Memory to make all variants of ``layers`` (LAYERS schema), without them, and the work."""
    groups = [layer_shapes(members, shape.itemsize) for _, members in layers.groupby("input_group", sort=False)]
    peaks = [method.peak_bytes(group, settings.compute.memory_gb * 1e9) for group in groups]
    return max(peaks, default=0), sum(map(method.operations, groups), start=0.0)


def _polish(settings: Settings, shape: ModelShape, name: str, table: pd.DataFrame) -> Stage:
    """One level of each layer, made in sequence: on average as large, and as much work, as the mean of its levels.

    Embedding and head stay as the variants have them.
    """
    search, text, table = settings.searches[name], settings.data.calibration, _inside(shape, table)
    both = search.polish == "asymmetric"  # models run: the polished one, and the dense one beside it
    tokens, hessians, levels = tokens_of(text), hessian_bytes(shape.layers), len(table) / table["name"].nunique()
    memory, flops = _compressing_blocks(settings, shape, settings.variants[search.variants], table)
    memory += _running(shape, text, TOKENS_AT_ONCE, (1 + both) * tokens) + (1 + both) * hessians / shape.blocks
    # Each block runs to be observed and once it is compressed; deviations are whole products, Hessians are half ones.
    # Side by side, both models run up to each of the inputs: on average half a block for each of about four.
    passes, products = 6 if both else 2, 1 + 2 * both
    flops = flops / levels + tokens * (
        passes * shape.blocks * shape.block_flops(text.sequence_length) + products * hessians / 4
    )
    disk = float(table["bytes"].sum()) / levels
    return Stage(f"polish {name}", 1, memory, disk, tokens, flops, note="one block after the other")


def _perplexity(settings: Settings, shape: ModelShape) -> Stage:
    models, all_texts = len(settings.searches) + 1, settings.data.evaluation.values()
    tokens = [tokens_of(text) for text in all_texts]
    flops = 0.0
    for text, count in zip(all_texts, tokens, strict=True):
        # Compressed models' logits are compared with the dense one's, which are made anew.
        heads = (2 * models - 1) * shape.head_flops
        flops += count * (models * shape.blocks * shape.block_flops(text.sequence_length) + heads)
    running = [_running(shape, text, RUN_TOKENS, 2 * count) for text, count in zip(all_texts, tokens, strict=True)]
    largest = max(running, key=lambda size: (math.isnan(size), size), default=0.0)
    dense = (models > 1) * shape.outside * shape.itemsize  # its head, beside a compressed model's
    memory = largest + dense + LOGITS * score_bytes(shape.itemsize)
    disk = sum(tokens) * shape.hidden_size * shape.itemsize
    return Stage("perplexity", models, memory, disk, sum(tokens) * models, flops)


def _runtime(settings: Settings, shape: ModelShape, models: int) -> Stage:
    asked = settings.evaluation.runtime
    assert asked is not None
    tokens = sum(min(tokens_of(text), asked.tokens) for text in settings.data.evaluation.values())
    timed = (asked.repetitions + 1) * (asked.prompt + asked.generated)
    # Each text passes this package and the runtime; the F16 file and the model's own take turns with the same prompt.
    flops = models * (2 * tokens + 2 * timed) * 2 * (shape.inside + shape.outside)
    f16 = 2.0 * (shape.inside + shape.outside)
    return Stage("runtime", models, 2 * f16, 0.0, models * tokens, flops, "with an F16 file beside it on the disk")
