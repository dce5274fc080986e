"""Asymmetric calibration (GPTAQ, arXiv 2504.02692): a compressed model's layer aims at what the dense model puts out.

A layer W gets inputs X (one row for each token) in the compressed model, where the dense model has X + Y. Its new
weights Q are to make Q X^T like W (X + Y)^T. With H = X^T X and D = Y^T X, and with the damping s of the Hessian as the
price of leaving W, what Q minimizes is, but for a constant,

    |Q X^T - W (X + Y)^T|^2 + s |Q - W|^2  =  tr (Q - W') (H + s I) (Q - W')^T,    W' = W + W D (H + s I)^-1.

So every method that minimizes an error weighted by a Hessian does this, too, once it is given W' for W: its sweep, its
feedback and its choice of what goes stay as they are. Inputs as in the dense model (D = 0) leave W as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from evopress.compression.cholesky import damped_cholesky
from evopress.compression.hessian import accumulate, batch_size, finished, input_widths, watched
from evopress.models.blockwise import BlockInputs, BlockwiseModel
from evopress.util.errors import CompressionError


@dataclass(frozen=True)
class InputStatistics:
    """Of the inputs of a block's layers in a compressed model, by input group, on the host."""

    hessians: dict[str, Tensor]
    """H = X^T X, float32 [columns, columns]."""
    deviations: dict[str, Tensor]
    """D = Y^T X, float32 [columns, columns]."""

    def target(self, group: str, weight: Tensor, damping: float) -> Tensor:
        """`asymmetric_target` of a layer of an input group."""
        hessian, deviation = (sums[group].to(weight.device) for sums in (self.hessians, self.deviations))
        return asymmetric_target(weight, hessian, deviation, damping)


def asymmetric_target(weight: Tensor, hessian: Tensor, deviation: Tensor, damping: float) -> Tensor:
    """Weights W' that stand for W (see the top of this file), in its type.

    Args:
        weight: W, [rows, columns].
        hessian: H, [columns, columns].
        deviation: D, [columns, columns].
        damping: share of the mean Hessian diagonal added to the diagonal, as the method that gets W' does.

    Raises:
        CompressionError: Cholesky fails at any damping.
    """
    factor = damped_cholesky(hessian, damping)
    lower = factor.reversed_unit.mul_(factor.pivots.flip(0))  # of the matrix with both axes reversed
    moved = (weight.double() @ deviation.double()).flip(1)
    return (weight + torch.cholesky_solve(moved.t(), lower).t().flip(1)).to(weight.dtype)


def observe_both(
    model: BlockwiseModel,
    block: int,
    hidden: Tensor,
    dense: Tensor,
    inputs: BlockInputs,
    layers: pd.DataFrame,
    weights: Mapping[str, Tensor],
) -> InputStatistics:
    """Run the hidden states of the compressed and of the dense model through a loaded dense block, side by side.

    Layers that have made up for their inputs change those of the layers after them in the same block. So these must be
    observed with the new weights, or they would make up for the same deviation once more.

    Args:
        model: runs the block.
        block: index of the block.
        hidden: [S, L, H] on the host, of the compressed model.
        dense: the same of the dense model.
        inputs: of the blocks, from `embed`.
        layers: rows of the LAYERS schema whose inputs are wanted.
        weights: new weights of layers of the block, for the compressed model.

    Raises:
        CompressionError: an input is not finite, or a layer does not get the same tokens in both models.
    """
    widths, name_of = input_widths(layers), model.block_names[block]
    hessians, deviations = (
        {name: torch.zeros(width, width, device=model.device) for name, width in widths.items()} for _ in range(2)
    )
    expected: dict[str, Tensor] = {}

    def compare(name: str, given: Tensor) -> None:
        """Add the inputs [S, L, columns] of a layer, beside those that it has in the dense model."""
        if given.shape != expected[name].shape:
            raise CompressionError(
                f"{name_of}.{name}: gets other tokens in the compressed model than in the dense one, so its outputs "
                "cannot be compared; set `polish: sequential`"
            )
        x = given.flatten(0, -2).float()
        accumulate(hessians[name], x)
        deviations[name].addmm_((expected[name].flatten(0, -2).float() - x).t(), x)

    size = batch_size(hidden, inputs)
    for part, dense_part in zip(hidden.split(size), dense.split(size), strict=True):
        with watched(model.blocks[block], widths, expected.__setitem__, stop=True):
            model.run_block(block, dense_part.to(model.device), inputs)
        with watched(model.blocks[block], widths, compare, stop=True):
            model.run_block(block, part.to(model.device), inputs, weights)
    return InputStatistics(
        {name: finished(hessian, name_of, name) for name, hessian in hessians.items()},
        {name: deviation.cpu() for name, deviation in deviations.items()},
    )
