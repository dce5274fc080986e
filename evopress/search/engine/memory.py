"""How the memory budget is divided; depends on shapes only, so that a restarted search computes the same bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evopress.models.blockwise import BlockwiseModel
from evopress.models.modules import OUTER
from evopress.models.structure import linear_layers
from evopress.search.evaluation import Minibatch
from evopress.search.space import Unit
from evopress.util.errors import ConfigError

RUN_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens that pass a block at once: enough to keep the device busy, more would only cost memory."""
SCORE_NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Numbers (tokens x vocabulary) of logits at once."""
ACTIVATION_WIDTH = 16
"""Numbers per token that are live inside a block, in hidden sizes (a gated MLP, and attention's inputs)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and the sizes of chunks that follow from them."""

    weights: int
    """Bytes of weights; on a CPU those held packed are among them."""
    hidden: int
    """Bytes of candidates' hidden states."""
    run_tokens: int
    """Tokens that pass a block at once (at least one sequence)."""
    score_tokens: int
    """Tokens whose logits are compared at once."""

    def states(self, length: int, hidden_size: int, itemsize: int) -> int:
        """Sequences of ``length`` tokens that fit, with those before and those after a block alive together."""
        return max(1, self.hidden // (2 * length * hidden_size * itemsize))

    def chunks(
        self, candidates: int, minibatch: Minibatch, hidden_size: int, itemsize: int
    ) -> Iterator[tuple[slice, slice, int]]:
        """Cut (candidates, sequences) so that hidden states fit; candidates are parted last.

        Candidates are in lexicographic order, so a part shares its prefixes.

        Yields:
            candidates, sequences of ``minibatch``, and the length of these sequences.
        """
        for start, end, length in minibatch.segments():
            room = self.states(length, hidden_size, itemsize)
            part = min(candidates, room)
            step = max(1, room // part)
            for first in range(start, end, step):
                for head in range(0, candidates, part):
                    yield slice(head, min(head + part, candidates)), slice(first, min(first + step, end)), length


def score_bytes(itemsize: int) -> int:
    """Bytes per number of logits: those of two models, and the dense distribution in float32 (p and log p)."""
    return 2 * itemsize + 8


def plan_memory(memory_gb: float, model: BlockwiseModel, length: int, units: Sequence[Unit] = ()) -> MemoryPlan:
    """Divide what is left beside embedding, head and norms, which stay loaded.

    Half is for weights, a quarter for hidden states, the rest for what lives while a block or the head runs. The
    dense model's final hidden states live in host memory and are not counted.

    Args:
        memory_gb: the budget.
        model: to be searched.
        length: tokens of a sequence.
        units: what is searched.

    Raises:
        ConfigError: one block, the embedding or head at a level, or one candidate's states of one sequence, does not
            fit.
    """
    itemsize, device = model.dtype.itemsize, model.device.type
    free = max(0, int(memory_gb * 1e9) - _outside(model))
    run_tokens = free // 8 // (ACTIVATION_WIDTH * model.hidden_size * itemsize)
    score_tokens = free // 8 // (model.vocab_size * score_bytes(itemsize))
    plan = MemoryPlan(
        weights=free // 2,
        hidden=free // 4,
        run_tokens=max(1, min(run_tokens, RUN_TOKENS.get(device, RUN_TOKENS["cuda"]))),
        score_tokens=max(1, min(score_tokens, SCORE_NUMBERS.get(device, SCORE_NUMBERS["cuda"]) // model.vocab_size)),
    )
    largest, state = _largest(model, units), _state(model, length)
    if plan.weights < largest or plan.hidden < state:
        outer = outer_weights(units) * itemsize
        what = "one block" if outer < largest else "the embedding or head at one level"
        raise ConfigError(
            f"compute.memory_gb: {memory_gb:g} is too little for {what} and the states of one sequence at a time; "
            f"this model needs at least {least_memory(model, length, units) / 1e9:.3g}"
        )
    return plan


def least_memory(model: BlockwiseModel, length: int, units: Sequence[Unit] = ()) -> int:
    """Bytes of the smallest budget that `plan_memory` divides."""
    return _outside(model) + max(2 * _largest(model, units), 4 * _state(model, length)) + 8  # with room for rounding


def _outside(model: BlockwiseModel) -> int:
    """Bytes of what lies outside the linear layers of blocks."""
    return sum(parameter.numel() for parameter in model.model.parameters()) * model.dtype.itemsize - sum(
        block_weights(model)
    )


def _largest(model: BlockwiseModel, units: Sequence[Unit]) -> int:
    """Bytes of what is the largest: the linear weights of a block, or an embedding or head that has levels."""
    return max(*block_weights(model), outer_weights(units) * model.dtype.itemsize)


def _state(model: BlockwiseModel, length: int) -> int:
    """Bytes of the hidden states of a sequence, before a block and after it."""
    return 2 * length * model.hidden_size * model.dtype.itemsize


def outer_weights(units: Sequence[Unit]) -> int:
    """Weights of the larger of embedding and head, which at a level lie beside the dense ones; 0 if none has any."""
    return max((unit.parameters for unit in units if unit.layer in OUTER), default=0)


def block_weights(model: BlockwiseModel) -> list[int]:
    """Bytes of the linear weights of each block."""
    counts = [sum(layer.weight.numel() for layer in linear_layers(block).values()) for block in model.blocks]
    return [count * model.dtype.itemsize for count in counts]


def packed_limit(host_gb: float, plan: MemoryPlan, model: BlockwiseModel, units: Sequence[Unit] = ()) -> int:
    """Bytes of packed weights that may be held in host memory.

    On a CPU they share the memory for weights, and leave room for two blocks, or for all of them where they fit: to
    keep weights unpacked saves more. An embedding or head that has levels needs room as well, now and then. The
    host of an accelerator may hold ``host_gb`` of them.
    """
    if model.device.type != "cpu":
        return int(host_gb * 1e9)
    blocks = block_weights(model)
    unpacked = sum(blocks) if sum(blocks) <= plan.weights else 2 * max(blocks)
    return plan.weights - max(unpacked, outer_weights(units) * model.dtype.itemsize)
