"""A linear layer at one level, as every method makes it."""

from dataclasses import dataclass

from torch import Tensor

from evopress.compression.packing import stored_bytes


@dataclass(frozen=True)
class Variant:
    """One layer at one level, packed."""

    layer: str
    level: str
    """Label, as in tables and names of tensors."""
    value: float
    """Bits, or sparsity."""
    cost: int
    """What a budget counts."""
    parameters: int
    """Weights of the layer."""
    format: str
    """How the parts decode (`packing.decode`)."""
    parts: dict[str, Tensor]
    error: float
    """Relative output error tr(dW H dW^T) / tr(W H W^T)."""
    damping: float

    @property
    def bytes(self) -> int:
        """Exact size of the parts."""
        return stored_bytes(self.parts)
