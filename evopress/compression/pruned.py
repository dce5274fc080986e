"""What every pruning method gives."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """Some levels of some layers of the same shape."""

    weights: Tensor
    """With zeros, in the type of the given weights, [levels, layers, rows, columns]."""
    kept: Tensor
    """Which weights are kept (and may still be zero), bool [levels, layers, rows, columns]."""
    errors: Tensor
    """tr(dW H dW^T), with the Hessian as given (no damping), float64 [levels, layers]."""
