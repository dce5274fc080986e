"""SparseGPT: pruning in which the weights that are kept make up for those that go."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evopress.compression.sparsity import PruningMethod

if TYPE_CHECKING:
    from torch import Tensor

    from evopress.compression.sparsity import Prune


class SparseGpt(PruningMethod):
    """SparseGPT (arXiv 2301.00774): weights that are kept make up for those that go."""

    factorizes = True
    method: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, lt=1, description="Share of the mean Hessian diagonal added to the diagonal.")
    block_size: int = Field(128, ge=1, description="Columns among which a mask is chosen and errors are made up for.")
    even_blocks: bool = Field(
        False, description="Take as much from every block of columns, as the paper does, and not where it costs least."
    )

    def pruner(self, hessian: "Tensor") -> "tuple[Prune, float]":
        """A sweep with the inverse factor of the damped Hessian."""
        from evopress.compression.sparsegpt import inverse_factor, sparsegpt

        factor = inverse_factor(hessian, self.damping)
        options = self.block_size, self.even_blocks
        return lambda weights, levels: sparsegpt(weights, factor, levels, *options), factor.damping
