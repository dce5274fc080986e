"""How the memory budget is divided; depends on shapes only, so that a restarted search computes the same bytes."""

from dataclasses import dataclass

from evopress.models.blockwise import BlockwiseModel

RUN_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens that pass a block at once: enough to keep the device busy, more would only cost memory."""
SCORE_NUMBERS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Numbers (tokens x vocabulary) of logits at once."""
ACTIVATION_WIDTH = 16
"""Numbers per token that are live inside a block, in hidden sizes (a gated MLP, and attention's inputs)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, and the sizes of chunks that follow from them."""

    weights: int
    """Bytes of unpacked weights that are kept."""
    hidden: int
    """Bytes of candidates' hidden states."""
    run_tokens: int
    """Tokens that pass a block at once (at least one sequence)."""
    score_tokens: int
    """Tokens whose logits are compared at once."""

    def states(self, length: int, hidden_size: int, itemsize: int) -> int:
        """Sequences of ``length`` tokens that fit, with those before and those after a block alive together."""
        return max(1, self.hidden // (2 * length * hidden_size * itemsize))


def plan_memory(memory_gb: float, model: BlockwiseModel) -> MemoryPlan:
    """Divide what is left beside the embedding and head."""
    itemsize = model.dtype.itemsize
    in_blocks = {id(parameter) for block in model.blocks for parameter in block.parameters()}
    outside = sum(p.numel() for p in model.model.parameters() if id(p) not in in_blocks) * itemsize
    return divide_memory(memory_gb, outside, model.hidden_size, model.vocab_size, itemsize, model.device.type)


def divide_memory(
    memory_gb: float, outside: int, hidden_size: int, vocab_size: int, itemsize: int, device: str
) -> MemoryPlan:
    """Divide what is left beside ``outside`` bytes (embedding, head, norms) that stay loaded.

    Half is for weights, a quarter for hidden states, the rest for what lives while a block or the head runs. The
    dense model's final hidden states live in host memory and are not counted.

    Args:
        memory_gb: the budget.
        outside: bytes of what lies outside the blocks.
        hidden_size: numbers per token between blocks.
        vocab_size: logits per token.
        itemsize: bytes of a number.
        device: type of the device, as in `cuda`.
    """
    free = max(0, int(memory_gb * 1e9) - outside)
    run_tokens = free // 8 // (ACTIVATION_WIDTH * hidden_size * itemsize)
    score_tokens = free // 8 // (vocab_size * (4 + 2 * itemsize))
    return MemoryPlan(
        weights=free // 2,
        hidden=free // 4,
        run_tokens=max(1, min(run_tokens, RUN_TOKENS.get(device, RUN_TOKENS["cuda"]))),
        score_tokens=max(1, min(score_tokens, SCORE_NUMBERS.get(device, SCORE_NUMBERS["cuda"]) // vocab_size)),
    )
