"""Fitness of many candidates on a minibatch: the Evaluator that runs a model."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.search.engine.counters import Counters
from evopress.search.engine.forward import Check, advance
from evopress.search.engine.memory import MemoryPlan
from evopress.search.engine.objectives import Objective, hidden_error, next_tokens
from evopress.search.engine.weights import VariantBlocks
from evopress.search.evolution.selection import Judgement
from evopress.search.minibatch import Minibatch, draw_minibatch
from evopress.util.progress import progress


class ModelEvaluator:
    """Judges candidates by what the model with their levels predicts; the same numbers as one full pass for each."""

    def __init__(
        self,
        blocks: VariantBlocks,
        tokens: Tensor,
        dense: Tensor | None,
        objective: Objective,
        memory: MemoryPlan,
        counters: Counters,
        check: Check,
        counted: Tensor | None = None,
    ) -> None:
        """Hold what all evaluations share.

        Args:
            blocks: the model with its variants.
            tokens: [sequences, L] search tokens.
            dense: [sequences, L, H] final hidden states of the dense model on them, if the objective needs it.
            objective: fitness of a token.
            memory: sizes of chunks.
            counters: counts the work.
            check: called between chunks; raises if the search should stop.
            counted: [sequences, L] bool, the positions that are judged (`evopress.data.tokens.read_counted`); None
                are all.
        """
        self.blocks, self.tokens, self.dense = blocks, tokens, dense
        self.objective, self.memory, self.counters, self.check = objective, memory, counters, check
        self.counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Minibatch of exactly ``tokens`` tokens (`draw_minibatch`)."""
        sequences, length = self.tokens.shape
        return draw_minibatch(tokens, sequences, length, rng, longest)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Judgement]:
        """Judge each of ``candidates`` [C, units] on the same tokens."""
        distinct, inverse = np.unique(candidates, axis=0, return_inverse=True)
        return self.judgements(self.sums(distinct, minibatch), inverse.reshape(-1), minibatch)

    @torch.inference_mode()
    def sums(self, distinct: NDArray[np.int16], minibatch: Minibatch) -> NDArray[np.float64]:
        """Sums over the positions that count, [2, C, S], of ``distinct`` [C, units] in lexicographic order.

        First fitness, then the errors of final hidden states, which are NaN without a run of the dense model.
        """
        sums = np.zeros((2, len(distinct), len(minibatch.sequences)))
        chunks = list(self._chunks(len(distinct), minibatch))
        steps = len(chunks) * (len(self.blocks.units_of) + 1)  # the head is one more
        with progress(f"judging {len(distinct)} candidates", steps, "blocks", brief=True) as bar:
            for part, sequences, length in chunks:
                rows = torch.tensor(minibatch.sequences[sequences])
                ids = self.tokens[rows, :length].to(self.blocks.model.device)
                run_tokens, check = self.memory.run_tokens, self.check
                finals = advance(self.blocks, distinct[part], ids, run_tokens, self.counters, check, bar.advance)
                sums[:, part, sequences] = self._score(finals, ids, rows)
                bar.advance()
        return sums

    def judgements(self, sums: NDArray[np.float64], which: NDArray[np.int64], minibatch: Minibatch) -> list[Judgement]:
        """Judgements from sums [2, C, S] over positions; ``which`` row of them belongs to each candidate."""
        self.counters.evaluations += 1
        self.counters.candidate_tokens += len(which) * minibatch.tokens
        positions = self._positions(minibatch, self.objective.positions_lost)
        fitness = sums[0].sum(axis=1) / positions.sum()
        errors = sums[1].sum(axis=1) / self._positions(minibatch).sum()
        means = sums[0] / np.maximum(positions, 1)
        return [Judgement(float(fitness[i]), tuple(means[i].tolist()), float(errors[i])) for i in which]

    def _positions(self, minibatch: Minibatch, lost: int = 0) -> NDArray[np.int64]:
        """Number of positions of each sequence that count, without the ``lost`` ones at its end, [S]."""
        parts = zip(minibatch.sequences, minibatch.lengths, strict=True)
        return np.array([int(self.counted[row, : length - lost].sum()) for row, length in parts])

    def _chunks(self, candidates: int, minibatch: Minibatch) -> Iterator[tuple[slice, slice, int]]:
        """Cut (candidates, sequences) so that hidden states fit in memory; candidates are parted last.

        Candidates are in lexicographic order, so a part shares its prefixes.
        """
        model = self.blocks.model
        for start, end, length in minibatch.segments():
            room = self.memory.states(length, model.hidden_size, model.dtype.itemsize)
            part = min(candidates, room)
            step = max(1, room // part)
            for first in range(start, end, step):
                for head in range(0, candidates, part):
                    yield slice(head, min(head + part, candidates)), slice(first, min(first + step, end)), length

    def _score(self, finals: list[Tensor], ids: Tensor, rows: Tensor) -> NDArray[np.float64]:
        """Sums over the positions that count, [2, C, S]; the dense logits are made once for all candidates."""
        model, (sequences, length) = self.blocks.model, ids.shape
        flat = [final.flatten(0, 1) for final in finals]
        dense = None if self.dense is None else self.dense[rows, :length].flatten(0, 1)
        targets, head = next_tokens(ids), self._head
        scores = torch.full((2, len(finals), len(targets)), torch.nan, dtype=torch.float32, device=model.device)
        for tokens in even_slices(len(targets), self.memory.score_tokens):
            near = None if dense is None else dense[tokens].to(model.device)
            prepared = self.objective.prepare(targets.new_empty(0) if near is None else head(near), targets[tokens])
            for index, hidden in enumerate(flat):
                self.check()
                scores[0, index, tokens] = self.objective.score(prepared, head(hidden[tokens]))
                if near is not None:
                    scores[1, index, tokens] = hidden_error(near, hidden[tokens])
        if self.objective.reads_logits:
            self.counters.head_tokens += len(targets) * (len(finals) + (dense is not None))
        scores[:, :, ~self.counted[rows, :length].flatten().to(model.device)] = 0.0
        return scores.double().unflatten(2, (sequences, length)).sum(-1).cpu().numpy()

    def _head(self, hidden: Tensor) -> Tensor:
        """What the objective reads of final hidden states [T, H]."""
        return self.blocks.model.logits(hidden[None])[0] if self.objective.reads_logits else hidden


def even_slices(total: int, most: int) -> list[slice]:
    """Cut ``total`` into as few slices of at most ``most`` as possible, of nearly equal size."""
    count = -(-total // most)
    return [slice(i * total // count, (i + 1) * total // count) for i in range(count)]
