"""Divergence and likelihood from logits, exact over the whole vocabulary, in bounded memory; and how sure a mean is.

Rows are worked on in pieces small enough to stay in a processor's cache, through buffers that are used again, so the
float32 copies never reach the size of the logits themselves, however many tokens a caller passes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

PIECE = 1 << 18
"""Numbers (rows x vocabulary) that are held in float32 at once on a CPU: 1 MB a buffer."""
_ACCELERATOR_PIECE = 1 << 26
"""The same elsewhere: enough to keep an accelerator busy with each operation."""
IGNORE = -100
"""Target of a position after which the text is unknown."""


@dataclass(frozen=True)
class Distribution:
    """Next-token distributions, float32 [T, V]; kept where many are compared with it."""

    probabilities: Tensor
    log_probabilities: Tensor


def distribution(logits: Tensor) -> Distribution:
    """Distributions from logits [T, V] of any floating dtype."""
    probabilities, log_probabilities = (
        torch.empty(logits.shape, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    for rows in pieces(logits):
        total = _log_softmax(logits[rows], log_probabilities[rows], probabilities[rows])
        probabilities[rows].div_(total)
    return Distribution(probabilities, log_probabilities)


def kl_divergence(teacher: Distribution, logits: Tensor) -> Tensor:
    """KL(teacher || model) = sum over V of p (log p - log q) in nats; exactly 0 for the teacher's own logits.

    Args:
        teacher: of T tokens.
        logits: the model's, [T, V], any floating dtype.

    Returns:
        [T] float32. NaN or infinite logits give NaN.
    """
    divergence = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    buffers: Tensor | None = None
    for rows in pieces(logits):
        if buffers is None:
            buffers = torch.empty((2, *logits[rows].shape), dtype=torch.float32, device=logits.device)
        terms, scratch = buffers[:, : len(divergence[rows])]
        _log_softmax(logits[rows], terms, scratch)
        torch.sub(teacher.log_probabilities[rows], terms, out=terms)
        torch.sum(terms.mul_(teacher.probabilities[rows]), -1, out=divergence[rows])
    return divergence


def _log_softmax(logits: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """Log-probabilities [T, V] of ``logits``, into ``out``.

    torch's own adds the terms of a row one after the other, which over a large vocabulary loses digits where a
    processor adds few at a time; its sum adds them pairwise.

    Returns:
        [T, 1] sums of the exponentials that are left in ``scratch`` [T, V].
    """
    torch.sub(logits.float(), logits.amax(-1, keepdim=True), out=out)
    total = torch.exp(out, out=scratch).sum(-1, keepdim=True)
    out.sub_(total.log())
    return total


def kl_per_token(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """The same from the teacher's logits [T, V], of which no float32 copy is kept."""
    parts = [kl_divergence(distribution(teacher_logits[rows]), logits[rows]) for rows in pieces(logits)]
    return torch.cat(parts) if parts else logits.new_empty(0, dtype=torch.float32)


def nll_per_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    Args:
        logits: [T, V], any floating dtype.
        targets: [T] int64; IGNORE gives 0.

    Returns:
        [T] float32.
    """
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in pieces(logits):
        loss[rows] = cross_entropy(logits[rows].float(), targets[rows], reduction="none", ignore_index=IGNORE)
    return loss


def pieces(logits: Tensor) -> Iterator[slice]:
    """Cut the rows of [T, V] so that a piece has at most PIECE numbers (and at least one row)."""
    numbers = PIECE if logits.device.type == "cpu" else _ACCELERATOR_PIECE
    step = max(1, numbers // logits.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def error_of_mean(means: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    """Standard error of a mean over the tokens of several sequences, which are independent of each other.

    Args:
        means: over the tokens of each sequence, [S].
        tokens: of each, [S].

    Returns:
        NaN of a single sequence.
    """
    if len(means) < 2:
        return math.nan
    weights = tokens / tokens.sum()
    deviations = weights * (means - float(weights @ means))
    return math.sqrt(float(np.square(deviations).sum()) * len(means) / (len(means) - 1))


def with_error(value: float, stderr: float, digits: int) -> str:
    """A number, rounded, with its standard error if there is one (NaN is none)."""
    text = f"{value:,.{digits}f}" if math.isfinite(value) else str(value)
    return text if math.isnan(stderr) else f"{text} ±{stderr:.{digits}f}"
