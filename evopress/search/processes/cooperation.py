"""Judging candidates with several processes: the first one searches, the others do their shares when told.

Only the first process draws random numbers, decides and writes; the others know the model and the search text, and
nothing of generations. What it tells them are integers: what to do, and the candidates and tokens to do it on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from evopress.search.engine.fitness import ModelEvaluator
from evopress.search.evolution.selection import Judgement
from evopress.search.minibatch import Minibatch
from evopress.search.processes.ranks import Ranks
from evopress.search.processes.split import share_out


class _Order(IntEnum):
    PREPARE = 0
    JUDGE = 1
    STOP = 2


@dataclass
class Leader:
    """The first process's evaluator; its numbers are those of one process alone, to rounding."""

    ranks: Ranks
    make_evaluator: Callable[[], ModelEvaluator]

    def prepare(self) -> "Leader":
        """Have every process load the model and run its share of the dense one."""
        _tell(self.ranks, _Order.PREPARE)
        self.own = self.make_evaluator()
        return self

    def stop(self) -> None:
        """Let the others go."""
        _tell(self.ranks, _Order.STOP)

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Minibatch of exactly ``tokens`` tokens."""
        return self.own.draw(tokens, rng, longest)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Judgement]:
        """Judge each of ``candidates`` [C, units] on the same tokens."""
        distinct, inverse = np.unique(candidates, axis=0, return_inverse=True)
        _tell(self.ranks, _Order.JUDGE, len(distinct), len(minibatch.sequences))
        self.ranks.broadcast(torch.from_numpy(distinct))
        self.ranks.broadcast(torch.tensor([minibatch.sequences, minibatch.lengths]))
        sums = _judge_share(self.ranks, self.own, distinct, minibatch)
        return self.own.judgements(sums, inverse.reshape(-1), minibatch)


def follow(ranks: Ranks, make_evaluator: Callable[[], ModelEvaluator]) -> None:
    """Do what the first process tells, until it says that the search is over.

    Raises:
        LostPeerError: another process is gone.
    """
    evaluator: ModelEvaluator | None = None
    while True:
        order, candidates, sequences = ranks.broadcast(torch.zeros(3, dtype=torch.int64)).tolist()
        if order == _Order.STOP:
            return
        if order == _Order.PREPARE:
            evaluator = make_evaluator()
            continue
        assert evaluator is not None, "told to judge before being told to prepare"
        units = len(evaluator.blocks.units)
        distinct = ranks.broadcast(torch.zeros((candidates, units), dtype=torch.int16)).numpy()
        rows, lengths = ranks.broadcast(torch.zeros((2, sequences), dtype=torch.int64)).tolist()
        _judge_share(ranks, evaluator, distinct, Minibatch(tuple(rows), tuple(lengths)))


def _tell(ranks: Ranks, order: _Order, candidates: int = 0, sequences: int = 0) -> None:
    ranks.broadcast(torch.tensor([order, candidates, sequences]))


def _judge_share(
    ranks: Ranks, evaluator: ModelEvaluator, distinct: NDArray[np.int16], minibatch: Minibatch
) -> NDArray[np.float64]:
    """Sums [2, C, S] over the tokens of each sequence, of which this process makes its share."""
    model, units = evaluator.blocks.model, evaluator.blocks.units
    shares = share_out(
        distinct,
        np.array([unit.block for unit in units]),
        len(model.blocks),
        _head_work(evaluator),
        minibatch.lengths,
        ranks.count,
    )
    share, sums = shares[ranks.rank], torch.zeros((2, len(distinct), len(minibatch.sequences)), dtype=torch.float64)
    part = Minibatch(minibatch.sequences[share.sequences], minibatch.lengths[share.sequences])
    mine = distinct[share.candidates]
    if len(mine) and part.sequences:
        sums[:, share.candidates, share.sequences] = torch.from_numpy(evaluator.sums(mine, part))
    return ranks.sum(sums).numpy()


def _head_work(evaluator: ModelEvaluator) -> float:
    """Work of the head for a token, as a multiple of that of a block: the ratio of their weights."""
    model = evaluator.blocks.model
    per_block = sum(parameter.numel() for block in model.blocks for parameter in block.parameters()) / len(model.blocks)
    return model.hidden_size * model.vocab_size / per_block
