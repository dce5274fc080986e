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
        self.hessian = hessian.float()
        diagonal = self.hessian.diagonal()
        self.added = shift + (diagonal == 0).float()
        self.diagonal = diagonal + self.added
        self._feedback = self.hessian / self.diagonal

    def run(
        self,
        original: Tensor,
        deviation: Tensor,
        choose: Callable[[int, Tensor], Tensor],
        block_size: int,
    ) -> None:
        """Choose every column once more.

        Args:
            original: W, [columns, rows].
            deviation: W - Q, [columns, levels, rows], which is kept up to date.
            choose: is told a column and what would be best for it [levels, rows], and returns what it holds instead.
            block_size: columns between two updates by the columns of all earlier blocks.
        """
        panel = self._product(self.hessian, deviation).addcmul_(deviation, self.added[:, None, None])
        panel.div_(self.diagonal[:, None, None]).sub_(deviation).add_(original[:, None])

        def column(index: int) -> None:
            """Choose it, and leave in the panel what later columns have to know: by how much it deviates more."""
            changed = original[index] - choose(index, panel[index])
            torch.sub(changed, deviation[index], out=panel[index])
            deviation[index].copy_(changed)

        sweep_columns(panel.flatten(1), self._feedback, [block_size, INNER_CHUNK, 1], column)

    def refit(
        self, deviation: Tensor, own: Tensor, part: Tensor, factor: Tensor, store: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Fit a number that some columns have in common to their codes, all others as they are.

        With the part P of Q that it is a factor of, the error is least where that part grows by (P H D / P H P) P.

        Args:
            deviation: D, [columns, levels, rows], which is kept up to date.
            own: the columns, [n].
            part: P, [n, levels, rows].
            factor: the number, [levels, rows].
            store: rounds numbers to the type that stores them; not finite where that cannot hold one.

        Returns:
            The number that is stored from now on; the old one where no other is better.
        """
        rows, added = self.hessian[own], self.added[own, None, None]
        pull = self._product(rows, deviation).addcmul_(deviation[own], added)
        product = self._product(rows[:, own], part).addcmul_(part, added)
        best = (pull * part).sum(0) / (product * part).sum(0)
        stored = store(factor * (1 + best))
        change = stored / factor - 1
        better = ((change - best).abs() < best.abs()) & stored.isfinite() & (stored != 0)
        deviation[own] -= change.masked_fill(~better, 0.0) * part  # not where the part is 0, and `best` is NaN
        return torch.where(better, stored, factor)

    def errors(self, deviation: Tensor) -> Tensor:
        """Rows of tr(D H D^T) with the Hessian as given (no damping); float64 [levels, rows]."""
        return self._product(self.hessian, deviation).mul_(deviation).sum(0).double().clamp_(min=0.0)

    @staticmethod
    def _product(hessian: Tensor, deviation: Tensor) -> Tensor:
        """Matrix product [n, columns] x [columns, levels, rows]."""
        return (hessian @ deviation.flatten(1)).unflatten(1, deviation.shape[1:])
