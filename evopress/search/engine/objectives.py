"""What makes a candidate fit: functions of the dense model's and the candidate's logits, token by token.

All are exact over the whole vocabulary and in float32, on pieces of rows small enough to stay in a processor's cache.
What depends on the dense model alone is prepared once and shared by all candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from evopress.util.metrics import IGNORE, distribution, kl_divergence, nll_per_token, pieces


@dataclass(frozen=True)
class TopTeacher:
    """The dense model's k most likely tokens."""

    indices: Tensor
    """[tokens, k]."""
    log_probabilities: Tensor
    """[tokens, k + 1]; the last is that of all other tokens together."""


@dataclass(frozen=True)
class Objective:
    """A fitness function; lower is better."""

    prepare: Callable[[Tensor, Tensor], Any]
    """(dense logits [T, V], next tokens [T]) -> whatever ``score`` shares between candidates.

    The logits are empty where no teacher is needed.
    """
    score: Callable[[Any, Tensor], Tensor]
    """(prepared, logits [T, V]) -> float32 [T]."""
    needs_teacher: bool = True
    positions_lost: int = 0
    """Positions at the end of a sequence that do not count."""
    reads_logits: bool = True
    """False: in place of logits, ``prepare`` and ``score`` get final hidden states [T, H]."""


def make_objective(name: str, top_k: int) -> Objective:
    """Objective by its name (`search.base.Fitness`)."""
    if name == "kl":
        return Objective(lambda logits, _: distribution(logits), kl_divergence)
    if name == "topk_kl":
        return Objective(lambda logits, _: soften_top(logits, top_k), topk_kl)
    if name == "hidden_error":
        return Objective(lambda hidden, _: hidden, hidden_error, reads_logits=False)
    return Objective(lambda _, targets: targets, _next_token_loss, needs_teacher=False, positions_lost=1)


def soften_top(logits: Tensor, k: int) -> TopTeacher:
    """The k most likely tokens of the dense model."""
    indices = torch.cat([logits[rows].topk(k, dim=-1).indices for rows in pieces(logits)])
    return TopTeacher(indices, _bucket(logits, indices))


def topk_kl(teacher: TopTeacher, logits: Tensor) -> Tensor:
    """KL over the dense model's k most likely tokens and one bucket for the rest of the mass, [T]."""
    log_q = _bucket(logits, teacher.indices)
    log_p = teacher.log_probabilities
    # An empty bucket (k = V) is -inf on both sides and adds nothing.
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1)


def hidden_error(dense: Tensor, hidden: Tensor) -> Tensor:
    """Squared error of hidden states [T, H] relative to the dense model's, token by token, [T]."""
    dense = dense.float()
    return (hidden.float() - dense).square().sum(-1) / dense.square().sum(-1)


def next_tokens(ids: Tensor) -> Tensor:
    """Targets of each position of ``ids`` [S, L], flattened to [S x L]; the last of a sequence has none."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE).flatten()


def _next_token_loss(targets: Tensor, logits: Tensor) -> Tensor:
    """Negative log-likelihood of the next token, [T]; 0 where it is not known. Its mean is the log of perplexity."""
    return nll_per_token(logits, targets)


def _bucket(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of ``indices`` [T, k], followed by that of all other tokens together, [T, k + 1]."""
    parts = []
    for rows in pieces(logits):
        log_q = log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        top = log_q.gather(-1, indices[rows])
        # Summing what is left, rather than 1 - sum(top), keeps small tails exact.
        rest = log_q.scatter_(-1, indices[rows], -torch.inf).logsumexp(-1, keepdim=True)
        parts.append(torch.cat([top, rest], dim=-1))
    return torch.cat(parts)
