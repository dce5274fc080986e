"""Memory, disk and work of each stage.

Memory is the peak of one job, host and device together; work counts multiplications and additions of matrix products.
Sizes that hang on text of unknown length are NaN. What a stage does at once is told by the code that does it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from evopress.compression.base import Method
from evopress.compression.hessian import TOKENS_AT_ONCE
from evopress.compression.layers import layer_shapes
from evopress.config.data import TextSettings
from evopress.evaluation.perplexity import LOGITS, RUN_TOKENS
from evopress.export.exporters.huggingface import SHARD_BYTES
from evopress.plan.searches import SearchWork
from evopress.plan.shape import ModelShape
from evopress.search.engine.memory import ACTIVATION_WIDTH, score_bytes
from evopress.workflow.jobs import blocks_per_job
from evopress.workflow.settings import Settings
from evopress.workflow.slices import texts

_TOKEN_BYTES = 4


@dataclass(frozen=True)
class Stage:
    """What a stage needs; sizes in bytes, of all its jobs together but for the memory."""

    name: str
    jobs: int
    memory: float = 0.0
    disk: float = 0.0
    """That is written."""
    tokens: float = 0.0
    """Tokens that pass the model, or are written."""
    work: Mapping[str, float] = field(default_factory=dict)
    """Operations, by the stage of which they have the rate (`Rates`)."""
    note: str = ""
    read: float = 0.0
    """That is read from disk, as if nothing cached it: where nodes share one, what passes the network."""
    at_once: int | None = None
    """Jobs, or processes, that may run beside one another; None are all."""
    unpacked: float = 0.0
    """Weights that are brought to the device, beside its work."""

    @property
    def flops(self) -> float:
        """All operations."""
        return sum(self.work.values(), start=0.0)


@dataclass(frozen=True)
class Stages:
    """The stages of a run; each method gives one or more."""

    settings: Settings
    shape: ModelShape
    """The model on the device of the settings."""

    def all(
        self,
        variants: Mapping[str, pd.DataFrame],
        effects: Mapping[str, SearchWork],
        searches: Mapping[str, SearchWork],
    ) -> Iterator[Stage]:
        """All stages in the order in which they run.

        Args:
            variants: table of each database of variants (`Method.table`).
            effects: work of each set of single effects that is not refused.
            searches: work of each search that is not refused.
        """
        settings, models, size = self.settings, len(self.settings.searches), self.shape.bytes
        yield self.model()
        total = sum(map(tokens_of, texts(settings).values()))
        disk = total * _TOKEN_BYTES
        yield Stage("tokens", len(texts(settings)), disk=disk, tokens=total, note="disk before compression")
        yield from self.hessians()
        for name, table in variants.items():
            yield from self.variants(name, table)
        processes = settings.compute.processes
        for name, work in effects.items():
            yield _evaluating(f"effects {name}", processes, work)
        for name in settings.searches:
            yield self.search(name, searches.get(name))
        for name, search in settings.searches.items():
            if search.polishes:
                yield self.polish(name, variants[search.sources[0]])
        yield Stage("export", models, min(SHARD_BYTES, size), size * models, read=size * models)
        yield self.perplexity()
        if asked := settings.on_tasks():
            memory = (self.shape.outside + self.shape.inside) * self.shape.itemsize
            unknown, note = {"tasks": math.nan}, "work depends on the tasks' documents"
            yield Stage("tasks", len(asked), memory, work=unknown, note=note, read=size * len(asked))
        if measured := settings.in_runtime():
            yield self.runtime(len(measured))
        yield Stage("report", models + 1)

    def model(self) -> Stage:
        """Linked or dequantized, and read once to be checked."""
        shape, source = self.shape, self.settings.model
        if source.quantized:
            whole = (shape.outside + shape.inside) * (4 + shape.stored.itemsize)
            note = "dequantized in float32"
            return Stage("model", 1, whole, shape.bytes, note=note, read=shape.bytes + (shape.source or 0))
        disk, note = (shape.bytes, "in the hub's cache, linked") if source.local is None else (0, "links to the folder")
        part = (shape.outside + shape.inside / len(shape.blocks)) * shape.stored.itemsize
        return Stage("model", 1, part, disk, note=note, read=shape.bytes)

    def hessians(self) -> Iterator[Stage]:
        """Where a method or a search needs them."""
        settings, shape, text = self.settings, self.shape, self.settings.data.calibration
        needed = any(
            method.needs_hessians or (method.sequential and method.compresses_embedding)
            for method in settings.variants.values()
        )
        if not needed and not any(search.needs_hessians for search in settings.searches.values()):
            return
        shards, total = settings.hessians.shards, self._all_hessians
        first = shape.layers[shape.layers["block"] == 0]
        copies = hessian_bytes(first) + 2 * 4 * int(first["columns"].max()) ** 2
        memory = self._running(text, TOKENS_AT_ONCE, tokens_of(text) / shards) + copies
        # Only the upper triangle is accumulated: one multiplication and addition for each half of the matrix.
        flops = self._forward(text) + tokens_of(text) * total / 4
        work, read = {"hessians": flops}, shards * self.shape.bytes
        yield Stage("hessians", shards, memory, total * shards, tokens_of(text), work, read=read)
        if shards > 1:
            yield Stage("hessian sums", len(shape.blocks) + 1, 2 * hessian_bytes(first), total, read=total * shards)

    def variants(self, name: str, table: pd.DataFrame) -> Iterator[Stage]:
        """Of all blocks, and of embedding and head."""
        method, shape = self.settings.variants[name], self.shape
        if not method.per_block:
            yield Stage(f"variants {name}", 1, note="only a list")
            return
        inside = self._inside(table)
        memory, flops = self._compressing(method, inside)
        memory += float(inside[inside["block"] == inside["block"].max() // 2]["bytes"].sum())
        jobs = -(-len(shape.blocks) // blocks_per_job(self.settings, shape.hidden_size, len(shape.blocks)))
        read = self.shape.bytes + (self._all_hessians if method.needs_hessians else 0)
        made = Stage(f"variants {name}", jobs, memory, float(inside["bytes"].sum()), 0, {"variants": flops}, read=read)
        yield self._in_sequence(made, passes=2, models=1) if method.sequential else made
        if method.compresses_embedding:
            outer = table.drop(inside.index)
            own = shape.outer[shape.outer["name"].isin(outer["name"])]
            memory, flops = self._peak_and_operations(method.for_embedding(), own)
            disk, work = float(outer["bytes"].sum()), {"variants": flops}
            yield Stage(f"variants {name}, embedding", 1, memory + disk, disk, 0, work, "with the head")

    def search(self, name: str, work: SearchWork | None) -> Stage:
        """As its strategy asks for; without ``work``, one that is refused."""
        search, shape = self.settings.searches[name], self.shape
        if work is None:
            return Stage(f"search {name}", 1, math.nan, work={"search": math.nan}, note="refused: too little memory")
        if not work.memory_bytes:
            memory = 4.0 * shape.inside / len(shape.blocks) + hessian_bytes(shape.layers) / len(shape.blocks)
            return Stage(f"search {name}", 1, memory * search.needs_hessians, note="no candidate is run")
        return _evaluating(f"search {name}", max(1, search.workers(self.settings.compute.processes)), work)

    def polish(self, name: str, table: pd.DataFrame) -> Stage:
        """One level of each layer, made in sequence: on average as large, and as much work, as the mean of its levels.

        Embedding and head stay as the variants have them.
        """
        search, table = self.settings.searches[name], self._inside(table)
        both = search.polish == "asymmetric"  # models run: the polished one, and the dense one beside it
        levels = len(table) / table["name"].nunique()
        memory, flops = self._compressing(self.settings.variants[search.sources[0]], table)
        disk, work = float(table["bytes"].sum()) / levels, {"variants": flops / levels}
        made = Stage(f"polish {name}", 1, memory, disk, 0, work, read=self.shape.bytes)
        # Side by side, both models run up to each of the inputs: on average half a block for each of about four.
        return self._in_sequence(made, passes=6 if both else 2, models=1 + both)

    def perplexity(self) -> Stage:
        """Of the dense model, and of what each search has found."""
        shape, models = self.shape, len(self.settings.searches) + 1
        all_texts = list(self.settings.data.evaluation.values())
        tokens = sum(map(tokens_of, all_texts))
        # Compressed models' logits are compared with the dense one's, which are made anew.
        flops = models * sum(map(self._forward, all_texts)) + tokens * (2 * models - 1) * shape.head_flops
        running = [self._running(text, RUN_TOKENS, 2 * tokens_of(text)) for text in all_texts]
        largest = max(running, key=lambda size: (math.isnan(size), size), default=0.0)
        dense = (models > 1) * shape.outside * shape.itemsize  # its head, beside a compressed model's
        states = tokens * shape.hidden_size * shape.itemsize
        memory, read = largest + dense + LOGITS * score_bytes(shape.itemsize), models * (self.shape.bytes + states)
        return Stage("perplexity", models, memory, states, tokens * models, {"perplexity": flops}, read=read)

    def runtime(self, models: int) -> Stage:
        """Files in llama.cpp."""
        asked, parameters = self.settings.evaluation.runtime, self.shape.inside + self.shape.outside
        assert asked is not None
        tokens = sum(min(tokens_of(text), asked.tokens) for text in self.settings.data.evaluation.values())
        timed = (asked.repetitions + 1) * (asked.prompt + asked.generated)
        # Each text passes this package and the runtime; the F16 file and the model's own take turns with the same
        # prompt.
        flops, f16 = models * (2 * tokens + 2 * timed) * 2 * parameters, 2.0 * parameters
        note = "with an F16 file beside it on the disk"
        return Stage("runtime", models, 2 * f16, 0.0, models * tokens, {"runtime": flops}, note, models * f16)

    @property
    def _all_hessians(self) -> int:
        return hessian_bytes(self.shape.layers) + 4 * self.shape.hidden_size**2  # the last is that of the head's input

    def _forward(self, text: TextSettings) -> float:
        """Operations of a text in all blocks."""
        return tokens_of(text) * len(self.shape.blocks) * self.shape.block_flops(text.sequence_length)

    def _running(self, text: TextSettings, at_once: int, states: float) -> float:
        """Memory to take a text through the model block by block, with hidden states of so many tokens on the host."""
        shape, width = self.shape, ACTIVATION_WIDTH * max(at_once, text.sequence_length)
        return (shape.outside + (width + states) * shape.hidden_size) * shape.itemsize + shape.block_bytes

    def _in_sequence(self, made: Stage, passes: int, models: int) -> Stage:
        """Work on blocks one after the other, with Hessians of their own that are never on disk.

        Args:
            made: without the calibration tokens.
            passes: times that they run through each block, to be observed and once it is compressed.
            models: of which hidden states and Hessians are held; deviations are whole products, Hessians half ones.
        """
        text, hessians = self.settings.data.calibration, hessian_bytes(self.shape.layers)
        tokens = tokens_of(text)
        memory = made.memory + self._running(text, TOKENS_AT_ONCE, models * tokens)
        flops = passes * self._forward(text) + tokens * (2 * models - 1) * hessians / 4
        return replace(
            made,
            memory=memory + models * hessians / len(self.shape.blocks),
            tokens=tokens,
            work={**made.work, "hessians": flops},
            note="one block after the other",
            read=made.read + made.jobs * tokens * self.shape.hidden_size * self.shape.itemsize,
            at_once=1,
        )

    def _inside(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows of a table of variants that are of layers of blocks."""
        return table[table["block"].between(0, len(self.shape.blocks) - 1)]

    def _compressing(self, method: Method, table: pd.DataFrame) -> tuple[float, float]:
        """Memory to make all variants of a block (without them), and the work for those of all blocks."""
        own, layers = table[table["block"] == table["block"].min()], self.shape.layers
        memory, flops = self._peak_and_operations(method, layers[layers["name"].isin(own["name"])])
        return memory, len(self.shape.blocks) * flops

    def _peak_and_operations(self, method: Method, layers: pd.DataFrame) -> tuple[float, float]:
        """The method's own answer for ``layers`` (LAYERS schema)."""
        itemsize, memory = self.shape.itemsize, self.settings.compute.host_gb * 1e9
        groups = [layer_shapes(members, itemsize) for _, members in layers.groupby("input_group", sort=False)]
        peaks = [method.peak_bytes(group, memory) for group in groups]
        return max(peaks, default=0), sum(map(method.operations, groups), start=0.0)


def tokens_of(text: TextSettings) -> float:
    """NaN where all of a text is taken."""
    return float(text.tokens or math.nan)


def hessian_bytes(layers: pd.DataFrame) -> int:
    """Bytes of the Hessians of ``layers``: one float32 matrix for each distinct input of a block."""
    columns = layers.drop_duplicates(["block", "input_group"])["columns"]
    return 4 * int((columns**2).sum())


def _evaluating(name: str, processes: int, work: SearchWork) -> Stage:
    note = "" if work.kept else "weights are brought in again in each pass"
    whole, memory = work.whole, work.memory_bytes + work.dense_bytes
    return Stage(
        name,
        processes,
        memory,
        tokens=whole.candidate_tokens,
        work={"search": processes * whole.flops},
        note=note,
        read=processes * work.read_bytes,
        unpacked=processes * (whole.unpacked_bytes + whole.dense_bytes),
    )
