"""Evaluating many candidates by the model: the evaluator of a search, in the arithmetic that each minibatch asks for.

Most candidates are evaluated in the type that the device is fast in. Where that has 16 bits, its rounding hides what a
single unit does, so minibatches of single effects are evaluated by a model that works in float32, on the same weights.
One model is open at a time, so that a search never holds both.
"""

import gc
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import read_provenance
from evopress.config.context import StageContext
from evopress.data.tokens import read_counted, read_tokens
from evopress.models.blockwise import BlockwiseModel, final_hidden
from evopress.models.verify import check_model
from evopress.search.base import Fitness
from evopress.search.engine.forward import Check, advance, share_out
from evopress.search.engine.memory import MemoryPlan, packed_limit, plan_memory
from evopress.search.engine.objectives import Objective, hidden_error, make_objective, next_tokens
from evopress.search.engine.weights import Counters, PackedWeights, ReadAhead, Unpack, VariantBlocks
from evopress.search.evaluation import Evaluation, Minibatch, draw_minibatch
from evopress.search.problem import RankContext, SearchProblem
from evopress.search.processes import Ranks
from evopress.search.space import Space
from evopress.util.device import precise_dtype, working_dtype
from evopress.util.errors import ConfigError
from evopress.util.progress import progress


class ModelEvaluator:
    """Evaluates candidates by what the model with their levels predicts; the same numbers as one full pass for each."""

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
        ranks: Ranks | None = None,
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
            counted: [sequences, L] bool, the positions that are evaluated; None are all.
            ranks: the processes that share each evaluation; all of them call `evaluate` with the same arguments.
        """
        self.blocks, self.tokens, self.dense, self.ranks = blocks, tokens, dense, ranks or Ranks()
        self.objective, self.memory, self.counters, self.check = objective, memory, counters, check
        self.counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Minibatch of exactly ``tokens`` tokens (`draw_minibatch`)."""
        sequences, length = self.tokens.shape
        return draw_minibatch(tokens, sequences, length, rng, longest)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """Evaluate each of ``candidates`` [C, units] on the same tokens."""
        distinct, inverse = np.unique(candidates, axis=0, return_inverse=True)
        sums = self.sums(distinct, minibatch) if self.ranks.count == 1 else self._shared_sums(distinct, minibatch)
        return self._evaluations(sums, inverse.reshape(-1), minibatch)

    @torch.inference_mode()
    def sums(self, distinct: NDArray[np.int16], minibatch: Minibatch) -> NDArray[np.float64]:
        """Sums over the positions that count, [2, C, S], of ``distinct`` [C, units] in lexicographic order.

        First fitness, then the errors of final hidden states, which are NaN without a run of the dense model.
        """
        sums = np.zeros((2, len(distinct), len(minibatch.sequences)))
        model = self.blocks.model
        chunks = list(self.memory.chunks(len(distinct), minibatch, model.hidden_size, model.dtype.itemsize))
        steps = len(chunks) * (len(self.blocks.units_of) + 1)  # the head is one more
        with progress(f"evaluating {len(distinct)} candidates", steps, "blocks", brief=True) as bar:
            for part, sequences, length in chunks:
                rows = torch.tensor(minibatch.sequences[sequences])
                ids = self.tokens[rows, :length].to(model.device)
                run_tokens, check = self.memory.run_tokens, self.check
                finals = advance(self.blocks, distinct[part], ids, run_tokens, self.counters, check, bar.advance)
                sums[:, part, sequences] = self._score(finals, distinct[part], ids, rows)
                bar.advance()
        return sums

    def _shared_sums(self, distinct: NDArray[np.int16], minibatch: Minibatch) -> NDArray[np.float64]:
        """The same, of which each process makes its share; no number is of two, so their sum rounds nothing."""
        units, model = self.blocks.units, self.blocks.model
        of_block = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
        head = model.hidden_size * model.vocab_size / (sum(of_block) / len(of_block))  # by weights
        block_of = np.array([unit.block for unit in units]).clip(min=0)  # the embedding comes before the first
        shares = share_out(distinct, block_of, len(model.blocks), head, minibatch.lengths, self.ranks.count)
        share = shares[self.ranks.rank]
        part = Minibatch(minibatch.sequences[share.sequences], minibatch.lengths[share.sequences])
        sums = torch.zeros((2, len(distinct), len(minibatch.sequences)), dtype=torch.float64)
        if len(distinct[share.candidates]) and part.sequences:
            own = self.sums(distinct[share.candidates], part)
            sums[:, share.candidates, share.sequences] = torch.from_numpy(own)
        return self.ranks.sum(sums).numpy()

    def _evaluations(
        self, sums: NDArray[np.float64], which: NDArray[np.int64], minibatch: Minibatch
    ) -> list[Evaluation]:
        """From sums [2, C, S] over positions; ``which`` row of them belongs to each candidate."""
        self.counters.evaluations += 1
        self.counters.candidate_tokens += len(which) * minibatch.tokens
        positions = self._positions(minibatch, self.objective.positions_lost)
        fitness = sums[0].sum(axis=1) / positions.sum()
        errors = sums[1].sum(axis=1) / self._positions(minibatch).sum()
        means = sums[0] / np.maximum(positions, 1)
        return [Evaluation(float(fitness[i]), tuple(means[i].tolist()), float(errors[i])) for i in which]

    def _positions(self, minibatch: Minibatch, lost: int = 0) -> NDArray[np.int64]:
        """Number of positions of each sequence that count, without the ``lost`` ones at its end, [S]."""
        parts = zip(minibatch.sequences, minibatch.lengths, strict=True)
        return np.array([int(self.counted[row, : length - lost].sum()) for row, length in parts])

    def _score(
        self, finals: list[Tensor], candidates: NDArray[np.int16], ids: Tensor, rows: Tensor
    ) -> NDArray[np.float64]:
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
                scores[0, index, tokens] = self.objective.score(prepared, head(hidden[tokens], candidates[index]))
                if near is not None:
                    scores[1, index, tokens] = hidden_error(near, hidden[tokens])
        if self.objective.reads_logits:
            self.counters.head_tokens += len(targets) * (len(finals) + (dense is not None))
        scores[:, :, ~self.counted[rows, :length].flatten().to(model.device)] = 0.0
        return scores.double().unflatten(2, (sequences, length)).sum(-1).cpu().numpy()

    def _head(self, hidden: Tensor, candidate: NDArray[np.int16] | None = None) -> Tensor:
        """What the objective reads of final hidden states [T, H] of a candidate, or of the dense model."""
        if not self.objective.reads_logits:
            return hidden
        return self.blocks.model.logits(hidden[None], None if candidate is None else self.blocks.head(candidate))[0]


def even_slices(total: int, most: int) -> list[slice]:
    """Cut ``total`` into as few slices of at most ``most`` as possible, of nearly equal size."""
    count = -(-total // most)
    return [slice(i * total // count, (i + 1) * total // count) for i in range(count)]


def search_text(run: Run) -> torch.Tensor:
    """Search tokens, [sequences, L].

    Raises:
        ArtifactError: missing, damaged or of another model.
    """
    path = run.tokens("search")
    require_same_model(run, read_provenance(path), path)
    return read_tokens(run, "search")


def require_tokens(asked: Mapping[str, int], available: int, where: str) -> None:
    """Refuse settings that ask for more tokens than the search text has.

    Args:
        asked: tokens, by the name of the setting.
        available: tokens of the search text.
        where: dotted path of the search's settings.

    Raises:
        ConfigError: with the setting and both numbers.
    """
    for name, tokens in asked.items():
        if tokens > available:
            raise ConfigError(
                f"{where}.{name}: asks for {tokens} tokens, but the search text has {available}; lower it, or raise "
                f"data.search.tokens"
            )


def open_evaluator(
    context: StageContext,
    problem: SearchProblem,
    tokens: torch.Tensor,
    fitness: Fitness,
    where: str,
    check: Check,
    ranks: Ranks | None = None,
    *,
    only: Minibatch | None = None,
    counters: Counters | None = None,
) -> ModelEvaluator:
    """Load the model and run the dense one on ``tokens`` [sequences, L]; all processes call this together.

    With ``only``, a precise minibatch, the evaluator has no tokens but those, and its model works in `precise_dtype`.

    Raises:
        ConfigError: as `model_evaluator`.
    """
    ranks = ranks or Ranks()
    counted = read_counted(context.run, "search")
    if only is not None:
        part = list(only.sequences), slice(0, max(only.lengths))
        tokens, counted = tokens[part], counted[part]
    check_model(context.run)
    model = BlockwiseModel.from_folder(
        context.run.model,
        context.device,
        resident=False,
        quick=True,
        precise=only is not None,
        trust_remote_code=context.trust_remote_code,
    )
    unpack: Unpack = _no_variants
    read_ahead: ReadAhead | None = None
    held = 0
    if problem.store is not None:
        plan = plan_memory(context.memory_gb, model, tokens.shape[1], problem.space.units)
        limit = packed_limit(context.compute.host_gb, plan, model, problem.space.units)
        packed = PackedWeights(problem.store, context.device, model.stored, model.dtype, limit)
        unpack, read_ahead = packed.unpack, packed.read_ahead
        held = packed.bytes if context.device.type == "cpu" else 0
    return model_evaluator(
        model,
        problem.space,
        unpack,
        tokens,
        fitness,
        context.memory_gb,
        where,
        check,
        counted=counted,
        read_ahead=read_ahead,
        held=held,
        ranks=ranks,
        counters=counters,
    )


def _no_variants(block: int, layer: str, level: str) -> torch.Tensor:
    raise AssertionError(f"asked for level {level} of {layer} in block {block}, but only modules are dropped")


def model_evaluator(
    model: BlockwiseModel,
    space: Space,
    unpack: Unpack,
    tokens: torch.Tensor,
    fitness: Fitness,
    memory_gb: float,
    where: str,
    check: Check,
    *,
    counted: torch.Tensor | None = None,
    read_ahead: ReadAhead | None = None,
    held: int = 0,
    ranks: Ranks | None = None,
    counters: Counters | None = None,
) -> ModelEvaluator:
    """Run the dense model once and make the evaluator of all rounds.

    Args:
        model: with no block loaded.
        space: its units' levels are what ``unpack`` is asked for.
        unpack: gives the weight of a layer at a level.
        tokens: [sequences, L] search tokens.
        fitness: what candidates are evaluated by.
        memory_gb: for weights and hidden states.
        where: dotted path of the settings, for messages.
        check: raises if the search should stop.
        counted: positions of ``tokens`` that are evaluated; None are all.
        read_ahead: told what ``unpack`` will be asked for.
        held: bytes of the memory for weights that packed ones take.
        ranks: the processes that share the work; all call this together.
        counters: count the work.

    Raises:
        ConfigError: the memory is too little, or more top tokens are asked than the vocabulary has.
    """
    if fitness.name == "topk_kl" and fitness.top_k > model.vocab_size:
        raise ConfigError(f"{where}.top_k: {fitness.top_k} is more than the vocabulary has ({model.vocab_size})")
    objective = make_objective(fitness.name, fitness.top_k)
    memory, counters = plan_memory(memory_gb, model, tokens.shape[1], space.units), counters or Counters()
    dense, ranks = None, ranks or Ranks()
    if objective.needs_teacher:
        dense = ranks.in_parts(tokens, lambda rows: final_hidden(model, rows, memory.run_tokens, "dense model", check))
    blocks = VariantBlocks(model, space.units, unpack, memory.weights - held, counters, read_ahead)
    return ModelEvaluator(blocks, tokens, dense, objective, memory, counters, check, counted, ranks)


class SearchEvaluator:
    """Evaluates candidates of a search; opens the model when the first ones are to be evaluated."""

    def __init__(
        self, context: RankContext, problem: SearchProblem, tokens: Tensor, fitness: Fitness, check: Check
    ) -> None:
        """Open nothing yet; all processes of the search make the same calls.

        Args:
            context: the stage, in this process.
            problem: is solved.
            tokens: [sequences, L] search tokens.
            fitness: what candidates are evaluated by.
            check: called between chunks; raises if the search should stop.
        """
        self.context, self.problem, self.tokens, self.fitness, self.check = context, problem, tokens, fitness, check
        self.counters = Counters()
        self._open: tuple[ModelEvaluator, Minibatch | None] | None = None
        """The evaluator that is open, and the precise minibatch that is all it has; None is the whole text."""

    def draw(self, tokens: int, rng: np.random.Generator, longest: int | None = None) -> Minibatch:
        """Minibatch of exactly ``tokens`` tokens (`draw_minibatch`)."""
        sequences, length = self.tokens.shape
        return draw_minibatch(tokens, sequences, length, rng, longest)

    def evaluate(self, candidates: NDArray[np.int16], minibatch: Minibatch) -> list[Evaluation]:
        """Evaluate each of ``candidates`` [C, units] on the same tokens.

        Raises:
            ConfigError: the memory is too little, or more top tokens are asked than the vocabulary has.
        """
        if not (minibatch.precise and self._rounds):
            return self._evaluator(None).evaluate(candidates, minibatch)
        rows = tuple(range(len(minibatch.sequences)))
        return self._evaluator(minibatch).evaluate(candidates, replace(minibatch, sequences=rows))

    @cached_property
    def _rounds(self) -> bool:
        """Whether the device works in a type whose rounding hides single effects."""
        stored = BlockwiseModel.stored_in(self.context.run.model, trust_remote_code=self.context.trust_remote_code)
        working = working_dtype(stored, self.context.device)
        return precise_dtype(working) != working

    def _evaluator(self, only: Minibatch | None) -> ModelEvaluator:
        """The evaluator of the whole text, or the precise one of ``only`` these tokens."""
        if self._open is None or self._open[1] != only:
            self._open = None
            gc.collect()  # the caches of a model and what fills them refer to each other
            context, where = self.context, self.problem.where
            evaluator = open_evaluator(
                context,
                self.problem,
                self.tokens,
                self.fitness,
                where,
                self.check,
                context.ranks,
                only=only,
                counters=self.counters,
            )
            self._open = evaluator, only
        return self._open[0]
