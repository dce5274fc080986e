"""What a generation of an evolutionary (or random) search runs, unpacks and moves, and the memory that it takes."""

import math
from dataclasses import dataclass

import pandas as pd

from evopress.config.data import TextSettings
from evopress.plan.judging import dense_layers, memory_plan, minibatch, passes_of, peak_memory
from evopress.plan.shape import ModelShape
from evopress.plan.sharing import Sharing, Unrelated
from evopress.plan.space import kept_share, planned_space
from evopress.search.candidates import uniform_start
from evopress.search.engine.memory import MemoryPlan
from evopress.search.space import Space
from evopress.search.strategies.evolution import Evolution
from evopress.search.strategies.random import RandomSearch


@dataclass(frozen=True)
class StepWork:
    """One selection step."""

    candidates: int
    """The parent included, where it is judged."""
    tokens: int
    """Tokens on which each is judged."""
    share: float
    """Expected block work, as a share of that of one candidate at a time."""
    passes: int
    """Times that all blocks are gone through: more than one where hidden states do not fit at once."""
    changed: float
    """Expected layer variants beside the parent's."""
    hidden_bytes: int
    """Hidden states that are kept at once."""


@dataclass(frozen=True)
class SearchWork:
    """Expected work of a generation; sizes in bytes."""

    generations: int
    steps: tuple[StepWork, ...]
    candidate_tokens: int
    """Tokens x candidates that are judged."""
    block_tokens: float
    """Tokens x blocks that are run, prefixes shared."""
    block_tokens_alone: float
    """The same, one candidate at a time."""
    head_tokens: int
    """Tokens whose logits are made, the dense model's included."""
    unpacked_bytes: float
    """Weights that are unpacked."""
    moved_bytes: float
    """What is read for the generation: packed variants, dense layers that are streamed, the teacher's states."""
    flops: float
    start_flops: float
    """Operations before the first generation: the dense model on the search text, and random starts if there are."""
    start_unpacked_bytes: int
    """Weights of the first parent, where they are then kept."""
    working_set: float
    """Weights of searched layers that one pass uses, unpacked; of dropped modules, all weights of the blocks."""
    kept: bool
    """Whether these fit into the memory for weights, so that only changes are unpacked; else each pass unpacks all."""
    teacher_bytes: float
    """Final hidden states of the dense model on the search text, in host memory."""
    teacher_logits_bytes: float
    """What its logits would take."""
    memory_bytes: float
    """Peak on the device."""

    @property
    def share(self) -> float:
        """Block work of a generation, as a share of that of one candidate at a time."""
        return self.block_tokens / self.block_tokens_alone


def search_work(
    shape: ModelShape,
    variants: pd.DataFrame,
    settings: Evolution | RandomSearch,
    text: TextSettings,
    memory_gb: float,
    device: str,
    where: str,
) -> SearchWork:
    """Work out a search before it runs.

    Args:
        shape: the model.
        variants: table of its variants, as `Method.table` makes it.
        settings: the search.
        text: what it judges on; unknown size makes the teacher's size NaN.
        memory_gb: memory of a process.
        device: type of the device, as in `cuda`.
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: the target and the levels do not allow the search.
    """
    space = planned_space(variants, settings.target, settings.group_rule, where)
    memory, ran = memory_plan(shape, memory_gb, device), kept_share(space, shape.blocks)
    steps = _steps(shape, _sharing(space, shape.blocks, settings), settings, text.sequence_length, memory)
    weights = _weights(shape, variants, space, memory, steps)
    teacher = 0 if settings.fitness == "perplexity" else 1
    alone = sum(step.candidates * step.tokens for step in steps)
    shared = sum(step.share * step.candidates * step.tokens for step in steps)
    head_tokens = sum((step.candidates + teacher) * step.tokens for step in steps)
    available = float(text.tokens or math.nan)
    teacher_bytes = available * shape.hidden_size * shape.itemsize * teacher
    starts = _start_tokens(settings, len(space.units), even_fits=space.fits(uniform_start(space)))
    block_flops = shape.blocks * shape.block_flops(text.sequence_length)
    read = sum(step.tokens for step in steps) * shape.hidden_size * shape.itemsize * teacher
    return SearchWork(
        generations=settings.generations,
        steps=steps,
        candidate_tokens=alone,
        block_tokens=shared * shape.blocks * ran.blocks,
        block_tokens_alone=alone * shape.blocks * ran.blocks,
        head_tokens=head_tokens,
        unpacked_bytes=weights.unpacked,
        moved_bytes=weights.moved + read,
        flops=shared * ran.arithmetic * block_flops + head_tokens * shape.head_flops,
        start_flops=(starts * ran.arithmetic + available * teacher) * block_flops + starts * shape.head_flops,
        start_unpacked_bytes=weights.parent if weights.kept else 0,
        working_set=weights.working_set,
        kept=weights.kept,
        teacher_bytes=teacher_bytes,
        teacher_logits_bytes=available * shape.vocab_size * shape.itemsize * teacher,
        memory_bytes=peak_memory(
            shape, memory, max(step.hidden_bytes for step in steps), weights.most, text.sequence_length
        ),
    )


def _sharing(space: Space, blocks: int, settings: Evolution | RandomSearch) -> Sharing | Unrelated:
    """How candidates of one generation are related."""
    units = space.units
    if isinstance(settings, RandomSearch):
        return Unrelated(tuple(len(unit.levels) for unit in units))
    return Sharing.of([unit.block for unit in units], [unit.group for unit in units], blocks)


@dataclass(frozen=True)
class _Weights:
    """Bytes of weights: see `SearchWork` for those of the same name."""

    parent: int
    """Unpacked ones of one candidate."""
    working_set: float
    kept: bool
    unpacked: float
    moved: float
    """Packed variants, and dense layers that are streamed."""
    most: int
    """All that a long search would keep if there were room."""


def _weights(
    shape: ModelShape, variants: pd.DataFrame, space: Space, memory: MemoryPlan, steps: tuple[StepWork, ...]
) -> _Weights:
    chosen = zip(space.units, uniform_start(space), strict=True)
    compressed = [(unit, level) for unit, level in chosen if not unit.modules]
    parent = sum(unit.parameters for unit, _ in compressed) * shape.itemsize
    packing = sum(unit.levels[level].bytes for unit, level in compressed) / max(1, parent)
    dense, streamed = dense_layers(shape, variants, memory)
    working_set = parent * (1 + max(step.changed for step in steps) / len(space.units))
    kept = working_set <= memory.weights - (max(dense) if streamed else sum(dense))
    if not compressed:  # candidates of dropped modules use the dense weights
        working_set, kept = sum(dense), not streamed
    unpacked = _unpacked(steps, parent, len(space.units), kept)
    moved = unpacked * packing + sum(step.passes for step in steps) * sum(dense) * streamed
    return _Weights(parent, working_set, kept, unpacked, moved, sum(dense) + _all_levels(space, shape))


def _steps(
    shape: ModelShape,
    sharing: Sharing | Unrelated,
    settings: Evolution | RandomSearch,
    length: int,
    memory: MemoryPlan,
) -> tuple[StepWork, ...]:
    """Steps with the candidates that reach them; the parent is judged in the last one only."""
    steps = []
    counts = [settings.offspring, *settings.survivors[:-1]]
    for number, (count, tokens) in enumerate(zip(counts, settings.tokens, strict=True)):
        parent = number == len(counts) - 1
        together = count + parent
        passes, hidden = passes_of(shape, minibatch(tokens, length), together, memory)
        share = sharing.share(count, parent=parent)
        steps.append(StepWork(together, tokens, share, passes, sharing.changed(count), hidden))
    return tuple(steps)


def _unpacked(steps: tuple[StepWork, ...], all_units: int, units: int, kept: bool) -> float:
    """Bytes unpacked in a generation: what changes if the rest is kept, else everything in every pass."""
    if kept:
        return all_units * steps[0].changed / units
    return sum(step.passes * all_units * (1 + step.changed / units) for step in steps)


def _all_levels(space: Space, shape: ModelShape) -> int:
    """Bytes of all variants, unpacked: what a long search would keep if there were room."""
    layers = [unit for unit in space.units if not unit.modules]
    return sum(unit.parameters * len(unit.levels) for unit in layers) * shape.itemsize


def _start_tokens(settings: Evolution | RandomSearch, units: int, *, even_fits: bool) -> int:
    """Tokens that candidates run before the first generation, at most."""
    if isinstance(settings, RandomSearch):
        return 0
    starts = (1 if even_fits else settings.initial_candidates) + len(settings.start_from)
    if settings.start == "even":
        return 0 if starts == 1 else starts * settings.initial_tokens
    alone = (units + 1) * settings.sensitivity_tokens  # the dense model, and each unit
    return alone + (starts + 2) * settings.initial_tokens
