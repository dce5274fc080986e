"""Divergence and likelihood from logits, exact over the whole vocabulary, in bounded memory.

Rows are worked on in pieces small enough to stay in a processor's cache, so the float32 copies never reach the
size of the logits themselves, however many tokens a caller passes.
"""

import torch
from torch.nn.functional import cross_entropy, log_softmax

PIECE = 1 << 20
"""Numbers (rows x vocabulary) that are held in float32 at once: 4 MB a buffer."""


def kl_per_token(teacher_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) of each token's next-token distribution, in nats.

    Args:
        teacher_logits: [T, V], any floating dtype.
        logits: [T, V], any floating dtype.

    Returns:
        [T] float32, sum over V of p (log p - log q). NaN or infinite logits give NaN.
    """
    divergence = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _pieces(logits):
        log_p = log_softmax(teacher_logits[rows], dim=-1, dtype=torch.float32)
        difference = log_softmax(logits[rows], dim=-1, dtype=torch.float32).neg_().add_(log_p)
        divergence[rows] = log_p.exp_().mul_(difference).sum(-1)
    return divergence


def nll_per_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target token, in nats.

    Args:
        logits: [T, V], any floating dtype.
        targets: [T] int64.

    Returns:
        [T] float32.
    """
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _pieces(logits):
        loss[rows] = cross_entropy(logits[rows].float(), targets[rows], reduction="none")
    return loss


def _pieces(logits: torch.Tensor) -> list[slice]:
    """Cut the rows of [T, V] so that a piece has at most PIECE numbers (and at least one row)."""
    step = max(1, PIECE // logits.shape[-1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]
