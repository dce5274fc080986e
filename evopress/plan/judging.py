"""What judging candidates takes, whatever strategy asks for it: passes, hidden states, dense weights, memory."""

import pandas as pd

from evopress.plan.shape import ModelShape
from evopress.search.engine.memory import ACTIVATION_WIDTH, MemoryPlan, divide_memory, least_memory, score_bytes
from evopress.search.evaluation import Minibatch
from evopress.util.device import resolve_device


def device_type(name: str) -> str:
    """Type of the device that the settings name, which need not be in the machine that plans."""
    return resolve_device(name).type if name == "auto" else name.partition(":")[0]


def memory_plan(shape: ModelShape, memory_gb: float, device: str) -> MemoryPlan:
    """How a search of this model divides the memory of a ``device`` (its type, as in `cuda`)."""
    outside = shape.outside * shape.itemsize
    return divide_memory(memory_gb, outside, shape.hidden_size, shape.vocab_size, shape.itemsize, device)


def memory_needed(shape: ModelShape, length: int) -> int:
    """Bytes of the least budget with which a search of this model, on sequences of ``length`` tokens, will start."""
    blocks = shape.layers.groupby("block")["parameters"].sum()
    outside = shape.outside + shape.inside - int(blocks.sum())
    size = shape.itemsize
    return least_memory(outside * size, int(blocks.max()) * size, length, shape.hidden_size, size)


def minibatch(tokens: int, length: int) -> Minibatch:
    """Whole sequences, the last one cut to fit."""
    count = -(-tokens // length)
    return Minibatch(tuple(range(count)), (length,) * (count - 1) + (tokens - (count - 1) * length,))


def passes_of(shape: ModelShape, drawn: Minibatch, candidates: int, memory: MemoryPlan) -> tuple[int, int]:
    """Chunks into which candidates and sequences are cut, and bytes of hidden states before and after a block."""
    passes = most = 0
    for start, end, length in drawn.segments():
        room = memory.states(length, shape.hidden_size, shape.itemsize)
        part = min(candidates, room)
        sequences = min(max(1, room // part), end - start)
        passes += -(-(end - start) // sequences) * -(-candidates // part)
        most = max(most, 2 * part * sequences * length * shape.hidden_size * shape.itemsize)
    return passes, most


def dense_layers(shape: ModelShape, variants: pd.DataFrame, memory: MemoryPlan) -> tuple[list[int], bool]:
    """Bytes of each block that keeps a dense linear layer (else 0), and whether they are streamed."""
    compressed = set(variants["name"])
    keeps = shape.layers[~shape.layers["name"].isin(compressed)]["block"].unique()
    dense = [shape.block_bytes if block in keeps else 0 for block in range(shape.blocks)]
    return dense, sum(dense) > memory.weights // 2


def peak_memory(shape: ModelShape, memory: MemoryPlan, hidden: int, weights: float, length: int) -> float:
    """Bytes outside the blocks, kept weights, hidden states, and what lives while a block or the head runs."""
    run = max(memory.run_tokens, length) * ACTIVATION_WIDTH * shape.hidden_size * shape.itemsize
    score = memory.score_tokens * shape.vocab_size * score_bytes(shape.itemsize)
    held = max(min(weights, memory.weights), shape.block_bytes) + hidden
    return shape.outside * shape.itemsize + held + max(run, score)
