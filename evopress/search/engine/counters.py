"""How much work the search did, and how much it would have been one candidate at a time."""

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Sums over a run. Work is counted in tokens, once for each block (or head) that they pass."""

    block_tokens: int = 0
    """Blocks x tokens that were run."""
    block_tokens_alone: int = 0
    """Blocks x tokens of one full forward pass per candidate."""
    head_tokens: int = 0
    """Tokens whose logits were computed, the dense model's included."""
    candidate_tokens: int = 0
    """Candidates x tokens that were judged."""
    unpacked: int = 0
    """Layer variants that were unpacked."""
    unpacked_bytes: int = 0
    dense_bytes: int = 0
    """Bytes of layers that stay dense, each time that they were read."""
    peak_weight_bytes: int = 0
    """Most that unpacked and dense weights held at once."""
    peak_state_bytes: int = 0
    """Most that hidden states held at once: those before a block and those after it."""
    evaluations: int = 0
    """Times that candidates were judged together."""

    @property
    def share_of_block_work(self) -> float:
        """Block work done, as a share of that of one candidate at a time."""
        return self.block_tokens / max(1, self.block_tokens_alone)

    def facts(self) -> dict[str, int]:
        """All counts by name."""
        return asdict(self)
