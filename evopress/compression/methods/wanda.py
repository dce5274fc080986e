"""Wanda: pruning by the size of weights and of their inputs."""

from typing import TYPE_CHECKING, Literal

from evopress.compression.sparsity import PruningMethod

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.compression.sparsity import Prune


class Wanda(PruningMethod):
    """Wanda (arXiv 2306.11695): in each output row, the least weights times the norm of their inputs go."""

    method: Literal["wanda"] = "wanda"

    def pruner(self, hessian: "Tensor") -> "tuple[Prune, float]":
        """The scores need the norms of the inputs alone."""
        from evopress.compression.pruning import wanda

        return lambda weights, levels: wanda(weights, hessian, levels), 0.0
