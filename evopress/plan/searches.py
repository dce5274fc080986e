"""What a search does and holds: the engine judges what the strategy asks for, on a model without weights.

The strategy says which candidates it has evaluated together (`Strategy.evaluations`). The engine itself plans which of
their states are shared, cuts them to fit the memory, and keeps and drops weights; its own counters are the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.config.context import ComputeSettings
from evopress.config.data import TextSettings
from evopress.models.blockwise import BlockInputs
from evopress.plan.shape import ModelShape
from evopress.search.base import EffectsSettings, Fitness, Request, Strategy
from evopress.search.engine.evaluator import ModelEvaluator
from evopress.search.engine.memory import ACTIVATION_WIDTH, packed_limit, plan_memory, score_bytes
from evopress.search.engine.objectives import make_objective
from evopress.search.engine.weights import Counters, Key, VariantBlocks
from evopress.search.problem import SearchProblem
from evopress.search.processes import Ranks
from evopress.util.device import precise_dtype


@dataclass
class Work(Counters):
    """What evaluations did, in the first of the processes that share them."""

    passes: int = 0
    """Times that all blocks are gone through: several for one evaluation where hidden states do not fit at once."""
    flops: float = 0.0
    """Operations of matrix products."""

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """Together with the work of ``other``, done so many times; of peaks, the higher one."""
        values = ((part.name, getattr(self, part.name), getattr(other, part.name)) for part in fields(self))
        return Work(**{key: max(a, b) if key.startswith("peak") else a + times * b for key, a, b in values})


@dataclass
class SearchWork:
    """Expected work of a search, or of single effects; sizes in bytes, of one process."""

    rounds: float = 0.0
    before: Work = field(default_factory=Work)
    """What comes before the first round, with the dense model's run on the search text."""
    in_rounds: Work = field(default_factory=Work)
    """All rounds together."""
    dense_bytes: float = 0.0
    """Hidden states of the dense model, in host memory."""
    memory_bytes: float = 0.0
    """Peak on the device."""
    read_bytes: float = 0.0
    """Weights and packed variants that are read from disk."""
    kept: bool = True
    """Whether a candidate's weights fit in the memory for weights; else each pass brings all in again."""

    @property
    def whole(self) -> Work:
        """The whole search."""
        return self.before.plus(self.in_rounds)

    @property
    def a_round(self) -> Work:
        """A round, on average."""
        return Work().plus(self.in_rounds, 1 / max(1.0, self.rounds))


class _Blocks(VariantBlocks):
    """Blocks that hidden states pass unchanged; weights, which are shapes alone, come and go as in a search."""

    def run_states(
        self, block: int, levels: Sequence[int], states: list[Tensor], inputs: BlockInputs, most_sequences: int
    ) -> list[Tensor]:
        """The states; the block's weights are used."""
        for key in self._keys(block, levels):
            self.cache.weight(key)
        return states

    def _load(self, key: Key) -> Tensor:
        size = self.cache.size(key) // self.model.dtype.itemsize
        return torch.empty(size, dtype=self.model.dtype, device="meta")


class _First(Ranks):
    """The first of several processes, which hears nothing of the others."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Its own share."""
        return tensor


class _Counting(ModelEvaluator):
    """Counts what the evaluations of the engine do; fitness is not a number."""

    @property
    def work(self) -> Work:
        """What has been counted."""
        assert isinstance(self.counters, Work)
        return self.counters

    def _score(
        self, finals: list[Tensor], candidates: NDArray[np.int16], ids: Tensor, rows: Tensor
    ) -> NDArray[np.float64]:
        self.work.passes += 1
        if self.objective.reads_logits:
            self.counters.head_tokens += ids.numel() * (len(finals) + self.objective.needs_teacher)
            for candidate in candidates:
                self.blocks.head(candidate)
        return np.full((2, len(finals), len(ids)), np.nan)


def requests_of(strategy: Strategy, problem: SearchProblem) -> list[Request]:
    """What a strategy will have evaluated, drawn alike in every plan.

    Raises:
        ConfigError: it cannot solve the problem.
    """
    return strategy.evaluations(problem, np.random.Generator(np.random.PCG64(0)))


def search_work(
    shape: ModelShape,
    problem: SearchProblem,
    strategy: Strategy | EffectsSettings,
    requests: Sequence[Request],
    text: TextSettings,
    compute: ComputeSettings,
    device_gb: float | None = None,
) -> SearchWork:
    """Work of a search, or of single effects, that will have ``requests`` evaluated (`requests_of`).

    One model is open at a time: that of precise requests, which works in float32, has their tokens alone.

    Args:
        shape: the model on the device (`ModelShape.on`).
        problem: what is searched.
        strategy: searches, or measures.
        requests: in their order.
        text: what candidates are evaluated on; where its size is not set, that of the dense model's run is NaN.
        compute: memory and processes.
        device_gb: memory for weights and hidden states on the device; None is that of the settings.

    Raises:
        ConfigError: the memory is too little.
    """
    device_gb = device_gb or compute.host_gb
    work, rng = SearchWork(), np.random.Generator(np.random.PCG64(0))
    work.rounds = sum({request.round: request.times for request in requests if request.round}.values())
    by_dtype: dict[torch.dtype, list[Request]] = {}
    for request in requests:
        dtype = precise_dtype(shape.dtype) if request.precise else shape.dtype
        by_dtype.setdefault(dtype, []).append(request)
    looked_at = 0 if requests else max(strategy.tokens_asked().values(), default=0)  # in the dense model
    if looked_at:
        by_dtype[shape.dtype], work.before.candidate_tokens = [], looked_at
    for dtype, asked in by_dtype.items():
        of_type, most = replace(shape, dtype=dtype), max((request.tokens for request in asked), default=0)
        engine = _engine(of_type, problem, strategy, most, text, compute, device_gb)
        before, in_rounds = Work(), Work()
        for request in asked:
            done = _evaluate(engine, of_type, request, rng)
            if request.round:
                in_rounds = in_rounds.plus(done, request.times)
            else:
                before = before.plus(done, request.times)
        read = looked_at or (most if dtype != shape.dtype else float(text.tokens or "nan"))
        read *= engine.objective.needs_teacher  # by the dense model, of which each process runs a part
        before.flops += read / engine.ranks.count * len(shape.blocks) * shape.block_flops(text.sequence_length)
        work.before, work.in_rounds = work.before.plus(before), work.in_rounds.plus(in_rounds)
        work.dense_bytes = max(work.dense_bytes, read * shape.hidden_size * dtype.itemsize)
        work.memory_bytes = max(work.memory_bytes, _peak(engine, of_type, text.sequence_length))
        work.read_bytes += of_type.bytes + _packed_read(engine, before.plus(in_rounds), compute)
        work.kept &= int(shape.layers["parameters"].sum()) * dtype.itemsize <= engine.memory.weights
    return work


def _engine(
    shape: ModelShape,
    problem: SearchProblem,
    strategy: Strategy | EffectsSettings,
    tokens: int,
    text: TextSettings,
    compute: ComputeSettings,
    device_gb: float,
) -> _Counting:
    """The engine as a search opens it (`open_evaluator`), for ``tokens`` at once, over a model without weights."""
    units, length = problem.space.units, text.sequence_length
    memory = plan_memory(device_gb, shape, length, units)
    packed = sum(level.bytes for unit in units if not unit.modules for level in unit.levels)
    held = shape.device.type == "cpu" and packed <= packed_limit(compute.host_gb, memory, shape, units)
    fitness = strategy.minimizes() or Fitness("kl")
    unpack: Any = None  # there is nothing to unpack
    return _Counting(
        _Blocks(shape, units, unpack, memory.weights - packed * held, work := Work()),
        torch.zeros((-(-max(text.tokens or 0, tokens) // length), length), dtype=torch.int8),
        None,
        make_objective(fitness.name, fitness.top_k),
        memory,
        work,
        lambda: None,
        ranks=_First(count=max(1, strategy.workers(compute.processes))),
    )


def _evaluate(engine: _Counting, shape: ModelShape, request: Request, rng: np.random.Generator) -> Work:
    """Have candidates evaluated; returns what that took."""
    before, minibatch = replace(engine.work), engine.draw(request.tokens, rng, request.longest)
    engine.evaluate(request.candidates, minibatch)
    done = engine.work.plus(before, -1)
    length = sum(length**2 for length in minibatch.lengths) / minibatch.tokens  # of a token's sequence, on average
    done.flops = done.block_tokens * shape.block_flops(length) + done.head_tokens * shape.head_flops
    return done


def _peak(engine: _Counting, shape: ModelShape, length: int) -> float:
    """Bytes outside the blocks, weights that are kept, hidden states, and what lives while a block or the head runs."""
    memory = engine.memory
    run = max(memory.run_tokens, length) * ACTIVATION_WIDTH * shape.hidden_size * shape.itemsize
    score = memory.score_tokens * shape.vocab_size * score_bytes(shape.itemsize)
    all_levels = int(shape.layers["parameters"].sum()) * shape.itemsize + _sizes(engine)[1]
    weights = max(min(all_levels, memory.weights), shape.block_bytes)  # what a long search keeps if there is room
    return shape.outside * shape.itemsize + weights + engine.work.peak_state_bytes + max(run, score)


def _packed_read(engine: _Counting, work: Work, compute: ComputeSettings) -> float:
    """Bytes of packed variants, and of layers that stay dense, that are read from disk, as if nothing cached them."""
    packed, unpacked = _sizes(engine)
    held = packed <= packed_limit(compute.host_gb, engine.memory, engine.blocks.model, engine.blocks.units)
    read = work.unpacked_bytes * packed / max(1, unpacked)
    return work.dense_bytes + (min(packed, read) if held else read)


def _sizes(engine: _Counting) -> tuple[int, int]:
    """Bytes of all variants that are picked from, packed and unpacked."""
    levels = [(level, unit) for unit in engine.blocks.units if not unit.modules for level in unit.levels]
    unpacked = sum(unit.parameters for _, unit in levels) * engine.blocks.model.dtype.itemsize
    return sum(level.bytes for level, _ in levels), unpacked
