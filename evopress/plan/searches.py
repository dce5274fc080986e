"""What a search runs and unpacks, and the memory that it takes: its own rounds, planned as they run.

The strategy says which candidates it has evaluated together (`Strategy.evaluations`), the engine's planner which of
their states are shared, and its division of memory in how many passes they go through the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from evopress.compression.families import DROP
from evopress.config.data import TextSettings
from evopress.models.modules import OUTER
from evopress.plan.shape import ModelShape
from evopress.search.base import Request, Strategy
from evopress.search.engine.forward import plan_block
from evopress.search.engine.memory import ACTIVATION_WIDTH, divide_memory, least_memory, outer_weights, score_bytes
from evopress.search.engine.objectives import make_objective
from evopress.search.evaluation import draw_minibatch
from evopress.search.problem import SearchProblem
from evopress.search.processes.split import new_blocks
from evopress.search.space import DENSE_LEVEL, Unit


@dataclass
class Work:
    """Sums over evaluations."""

    candidate_tokens: float = 0.0
    """Tokens x candidates that are evaluated."""
    passes: float = 0.0
    """Times that all blocks are gone through: several for one evaluation where hidden states do not fit at once."""
    block_tokens: float = 0.0
    """Tokens x blocks that are run, prefixes shared."""
    block_tokens_alone: float = 0.0
    """The same, one candidate at a time."""
    head_tokens: float = 0.0
    """Tokens whose logits are made, the dense model's included."""
    unpacked_bytes: float = 0.0
    """Weights that are unpacked."""
    flops: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """Together with the work of ``other``, done so many times."""
        return Work(*(getattr(self, part.name) + times * getattr(other, part.name) for part in fields(self)))


@dataclass
class SearchWork:
    """Expected work of a search; sizes in bytes."""

    rounds: float = 0.0
    before: Work = field(default_factory=Work)
    """What comes before the first round, with the dense model's run on the search text."""
    in_rounds: Work = field(default_factory=Work)
    """All rounds together."""
    working_set: int = 0
    """Weights that the candidates of one evaluation use, and those of layers without levels."""
    kept: bool = True
    """Whether these fit into the memory for weights, so that only changes are unpacked; else each pass unpacks all."""
    state_bytes: int = 0
    """Most that hidden states of candidates hold at once."""
    dense_bytes: float = 0.0
    """Hidden states of the dense model on the search text, in host memory."""
    memory_bytes: float = 0.0
    """Peak on the device."""

    def then(self, other: "SearchWork") -> "SearchWork":
        """Followed by ``other``; what is held at once is the larger of both."""
        return SearchWork(
            self.rounds + other.rounds,
            self.before.plus(other.before),
            self.in_rounds.plus(other.in_rounds),
            max(self.working_set, other.working_set),
            self.kept and other.kept,
            max(self.state_bytes, other.state_bytes),
            max(self.dense_bytes, other.dense_bytes),
            max(self.memory_bytes, other.memory_bytes),
        )

    @property
    def whole(self) -> Work:
        """The whole search."""
        return self.before.plus(self.in_rounds)

    @property
    def a_round(self) -> Work:
        """A round, on average."""
        return Work().plus(self.in_rounds, 1 / max(1.0, self.rounds))

    @property
    def share(self) -> float:
        """Block work of the rounds, as a share of that of one candidate at a time."""
        return self.in_rounds.block_tokens / max(1.0, self.in_rounds.block_tokens_alone)


def requests_of(strategy: Strategy, problem: SearchProblem) -> list[Request]:
    """What a strategy will have evaluated, drawn alike in every plan.

    Raises:
        ConfigError: it cannot solve the problem.
    """
    return strategy.evaluations(problem, np.random.Generator(np.random.PCG64(0)))


def memory_needed(shape: ModelShape, length: int, units: Sequence[Unit] = (), *, precise: bool = False) -> int:
    """Bytes of the least budget with which a search over ``units``, on sequences of ``length`` tokens, will start.

    With ``precise``, one that measures single effects.
    """
    shape = shape.precise if precise else shape
    blocks, size = [sum(kinds.values()) for kinds in shape.modules], shape.itemsize
    outside = shape.outside + shape.inside - sum(blocks)
    largest = max(*blocks, outer_weights(units))
    return least_memory(outside * size, largest * size, length, shape.hidden_size, size)


class SearchPlanner:
    """Plans the searches of one problem on one device."""

    def __init__(
        self, shape: ModelShape, problem: SearchProblem, text: TextSettings, memory_gb: float, device: str
    ) -> None:
        """Divide the memory as a search does.

        Args:
            shape: the model, in the type that the device works in.
            problem: what is searched.
            text: what candidates are evaluated on; where its size is not set, that of the dense model's run is NaN.
            memory_gb: memory of a process.
            device: type of the device, as in `cuda`.
        """
        self.shape, self.units, self.text, size = shape, problem.space.units, text, shape.itemsize
        self.precise: SearchPlanner = self
        """Of what is evaluated where rounding would hide single effects."""
        if shape.precise != shape:
            self.precise = SearchPlanner(shape.precise, problem, text, memory_gb, device)
        self.memory = divide_memory(memory_gb, shape.outside * size, shape.hidden_size, shape.vocab_size, size, device)
        self.units_of: list[list[int]] = [[] for _ in range(shape.blocks)]
        for number, unit in enumerate(self.units):
            for block in unit.blocks if unit.layer not in OUTER else ():
                self.units_of[block].append(number)
        self.unpacked = np.array([0 if unit.modules else unit.parameters * size for unit in self.units])
        inside = [unit.layer not in OUTER for unit in self.units]
        self.dense = int(shape.layers["parameters"].sum()) * size - int(self.unpacked[inside].sum())
        self.block_of = np.array([unit.block for unit in self.units]).clip(min=0)
        self.drops = problem.family.takes_modules
        self.rng = np.random.Generator(np.random.PCG64(0))

    def plan(self, strategy: Strategy, requests: Sequence[Request]) -> SearchWork:
        """Work out a search that will have ``requests`` evaluated (`requests_of`) before it runs.

        One model is open at a time: the precise one has its tokens alone.
        """
        if self.precise is self:
            return self._plan(strategy, requests)
        single = [request for request in requests if request.precise]
        others = [request for request in requests if not request.precise]
        if not single:
            return self._plan(strategy, others)
        alone = self.precise._plan(strategy, single, read=max(request.tokens for request in single))
        return alone.then(self._plan(strategy, others)) if others else alone

    def _plan(self, strategy: Strategy, requests: Sequence[Request], read: float | None = None) -> SearchWork:
        """Work of requests that one model is opened for; the dense one runs on ``read`` tokens (None: the text)."""
        work, shape = SearchWork(), self.shape
        fitness = strategy.minimizes()
        objective = make_objective(fitness.name, fitness.top_k) if requests and fitness else None
        teacher = objective is not None and objective.needs_teacher
        head = objective is not None and objective.reads_logits
        used = [self._used(request.candidates) for request in requests]
        work.working_set = max(map(self._bytes, used), default=0)
        work.kept = work.working_set <= self.memory.weights
        held = np.zeros_like(used[0]) if used else None
        for request, own in zip(requests, used, strict=True):
            once = self._evaluation(request, work, teacher=teacher, head=head)
            if work.kept and held is not None:  # what is held and what is used are weights of this evaluation
                once.unpacked_bytes = self._bytes(own & ~held, dense=False)
                held = own | held if self._bytes(own | held) <= self.memory.weights else own
            if request.round:
                work.in_rounds = work.in_rounds.plus(once, request.times)
            else:
                work.before = work.before.plus(once, request.times)
        work.rounds = sum({request.round: request.times for request in requests if request.round}.values())
        looked_at = 0 if requests else max(strategy.tokens_asked().values(), default=0)  # in the dense model
        if read is None or not teacher:
            read = float(self.text.tokens or math.nan) if teacher else looked_at
        run = read * shape.blocks * shape.block_flops(self.text.sequence_length)
        work.before = work.before.plus(Work(candidate_tokens=looked_at, flops=run))
        work.dense_bytes = read * shape.hidden_size * shape.itemsize
        if requests or looked_at:
            work.memory_bytes = self._peak(work, evaluates=bool(requests))
        return work

    def _peak(self, work: SearchWork, *, evaluates: bool) -> float:
        """Bytes outside the blocks, kept weights, hidden states, and what lives while a block or the head runs."""
        shape, memory = self.shape, self.memory
        run = max(memory.run_tokens, self.text.sequence_length) * ACTIVATION_WIDTH * shape.hidden_size * shape.itemsize
        score = memory.score_tokens * shape.vocab_size * score_bytes(shape.itemsize)
        levels = np.array([len(unit.levels) for unit in self.units])
        weights = (self.dense + int(self.unpacked @ levels)) * evaluates  # what a long search keeps if there is room
        held = max(min(weights, memory.weights), shape.block_bytes) + work.state_bytes
        return shape.outside * shape.itemsize + held + max(run, score)

    def _evaluation(self, request: Request, work: SearchWork, *, teacher: bool, head: bool) -> Work:
        """Work of one evaluation, for which no weight is kept; raises ``work.state_bytes`` to what it holds."""
        shape, length, distinct = self.shape, self.text.sequence_length, np.unique(request.candidates, axis=0)
        sequences = -(-max(self.text.tokens or 0, request.tokens) // length)
        minibatch = draw_minibatch(request.tokens, sequences, length, self.rng, request.longest)
        once, shared = Work(len(request.candidates) * request.tokens), dict[int, _Pass]()
        for part, rows, own in self.memory.chunks(len(distinct), minibatch, shape.hidden_size, shape.itemsize):
            if part.start not in shared:
                shared[part.start] = self._pass(distinct[part])
            passed, tokens = shared[part.start], (rows.stop - rows.start) * own
            scored = (part.stop - part.start + teacher) * tokens if head else 0
            flops = passed.modules * shape.block_flops(own) * tokens + scored * shape.head_flops
            unpacked = self._bytes(self._used(distinct[part]), dense=False)
            once = once.plus(Work(0, 1, passed.runs * tokens, passed.alone * tokens, scored, unpacked, flops))
            states = passed.states * tokens * shape.hidden_size * shape.itemsize
            work.state_bytes = max(work.state_bytes, states)
        return once

    def _used(self, candidates: NDArray[np.int16]) -> NDArray[np.bool_]:
        """Weights that candidates [C, units] use, [units, 1 + levels], the dense ones first."""
        used = np.zeros((len(self.units), 1 + max(len(unit.levels) for unit in self.units)), dtype=bool)
        used[np.arange(len(self.units)), candidates - DENSE_LEVEL] = True
        return used

    def _bytes(self, used: NDArray[np.bool_], *, dense: bool = True) -> int:
        """Unpacked weights at these levels; with the ``dense`` ones, those of layers without levels, too."""
        own = used if dense else used[:, 1:]
        return int(self.unpacked @ own.sum(axis=1)) + self.dense * dense

    def _pass(self, candidates: NDArray[np.int16]) -> "_Pass":
        """Blocks that are run for distinct ``candidates`` [C, units], in lexicographic order."""
        if not self.drops:  # no block is skipped: how many states there are says all
            blocks = self.shape.blocks
            new = new_blocks(candidates, self.block_of, blocks)
            after = (new[:, None] >= blocks - np.arange(blocks)).sum(axis=0)
            most = int(max(np.add(after, [1, *after[:-1]])))
            return _Pass(int(after.sum()), len(candidates) * blocks, float(after.sum()), most)
        state_of, before, found = np.zeros(len(candidates), dtype=np.int64), 1, _Pass()
        for block, members in enumerate(self.units_of):
            plan = plan_block(state_of, candidates[:, members])
            state_of, after = plan.state_of, len(plan.parents)
            left = np.array([self._left(block, members, levels) for levels in plan.levels.tolist()])
            found.states, before = max(found.states, before + after), after
            found.modules += float(left.sum())
            found.runs += int((left > 0).sum())
            found.alone += int((left > 0)[state_of].sum())
        return found

    def _left(self, block: int, members: list[int], levels: list[int]) -> float:
        """Share of a block's linear weights that lie in modules which are not dropped."""
        modules = self.shape.modules[block]
        gone = {
            kind
            for index, level in zip(members, levels, strict=True)
            if self.units[index].modules and level != DENSE_LEVEL and self.units[index].levels[level].label == DROP
            for other, kind in self.units[index].modules
            if other == block
        }
        return sum(weights for kind, weights in modules.items() if kind not in gone) / sum(modules.values())


@dataclass
class _Pass:
    """Candidates that go through all blocks together."""

    runs: int = 0
    """Blocks that are run, summed over states."""
    alone: int = 0
    """The same, one candidate at a time."""
    modules: float = 0.0
    """Blocks that are run, less what is dropped of them, by weights."""
    states: int = 1
    """Most states that are held at once."""
