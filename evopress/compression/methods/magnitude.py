"""Pruning by magnitude: the baseline that looks at nothing but the weights."""

from typing import TYPE_CHECKING, Literal

from evopress.compression.sparsity import PruningMethod

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.compression.sparsity import Prune


class Magnitude(PruningMethod):
    """In each layer, the least weights go."""

    method: Literal["magnitude"] = "magnitude"

    def pruner(self, hessian: "Tensor") -> "tuple[Prune, float]":
        """The Hessian only tells the errors."""
        from evopress.compression.pruning import magnitude

        return lambda weights, levels: magnitude(weights, hessian, levels), 0.0
