"""Further passes over the columns of a layer that is compressed: each column is chosen again, given all others.

GPTQ and SparseGPT choose a column when those after it are not known, and never come back. With the deviations D = W - Q
of all columns and the damped Hessian H, the error tr(D H D^T) is least in column j, the others as they are, for

    q_j + (D H)_j / H_jj,

and of the values that the column can have for the nearest to that. So no pass makes the error larger: cyclic coordinate
descent, as in QuantEase (arXiv 2309.01885) for rounding; for weights that are kept by a mask it ends at least squares.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evopress.compression.cholesky import INNER_CHUNK, sweep_columns


class Descent:
    """Coordinate descent on the layers of one input. Buffers are [columns, everything else], in the order of visits."""

    def __init__(self, hessian: Tensor, shift: float) -> None:
        """Take the Hessian [columns, columns]; ``shift`` is added to its diagonal, which counts as 1 at dead inputs."""
        diagonal = hessian.diagonal()
        self.hessian = hessian
        self.added = shift + (diagonal == 0).float()
        self.diagonal = diagonal + self.added
        self._feedback = hessian / self.diagonal

    def run(
        self,
        original: Tensor,
        deviation: Tensor,
        choose: Callable[[int, Tensor], Tensor],
        block_size: int,
        refit: Callable[[Tensor], None] = lambda pull: None,
    ) -> None:
        """Choose every column once more.

        Args:
            original: W, [columns, rows].
            deviation: W - Q, [columns, levels, rows], which is kept up to date.
            choose: is told a column and what would be best for it [levels, rows], and returns what it holds instead.
            block_size: columns between two updates by the columns of all earlier blocks.
            refit: may change Q before, together with ``deviation`` and with ``pull``, H D as `pull_of` gives it.
        """
        panel = self.pull_of(deviation)
        refit(panel)
        panel.div_(self.diagonal[:, None, None]).sub_(deviation).add_(original[:, None])

        def column(index: int) -> None:
            """Choose it, and leave in the panel what later columns have to know: by how much it deviates more."""
            changed = original[index] - choose(index, panel[index])
            torch.sub(changed, deviation[index], out=panel[index])
            deviation[index].copy_(changed)

        sweep_columns(panel.flatten(1), self._feedback, [block_size, INNER_CHUNK, 1], column)

    def pull_of(self, deviation: Tensor, columns: Tensor | None = None) -> Tensor:
        """H D, [columns, levels, rows], of the deviations of these ``columns`` (all others 0); None is all."""
        if columns is None:
            return self._product(self.hessian, deviation).addcmul_(deviation, self.added[:, None, None])
        pull = self._product(self.hessian[:, columns], deviation)
        return pull.index_add_(0, columns, deviation * self.added[columns, None, None])

    def errors(self, deviation: Tensor) -> Tensor:
        """Rows of tr(D H D^T) with the Hessian as given (no damping); float64 [levels, rows]."""
        return self._product(self.hessian, deviation).mul_(deviation).sum(0).double().clamp_(min=0.0)

    @staticmethod
    def _product(hessian: Tensor, deviation: Tensor) -> Tensor:
        """Matrix product [n, columns] x [columns, levels, rows]."""
        return (hessian @ deviation.flatten(1)).unflatten(1, deviation.shape[1:])
