"""What a generation of an evolutionary search runs, unpacks and moves, and the memory that it takes."""

import math
from dataclasses import dataclass

import pandas as pd

from evopress.config.data import TextSettings
from evopress.config.search import EvolutionSettings
from evopress.planning.shape import ModelShape
from evopress.planning.sharing import Sharing
from evopress.planning.space import kept_share, planned_space
from evopress.search.initial import even_candidate
from evopress.search.memory import ACTIVATION_WIDTH, MemoryPlan, divide_memory, score_bytes
from evopress.search.minibatch import Minibatch
from evopress.search.space import Space


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
    settings: EvolutionSettings,
    text: TextSettings,
    memory_gb: float,
    device: str,
    where: str,
) -> SearchWork:
    """Work out a search before it runs.

    Args:
        shape: the model.
        variants: table of its variants, as `planning.variants.variant_table` makes it.
        settings: the search.
        text: what it judges on; unknown size makes the teacher's size NaN.
        memory_gb: memory of a process.
        device: type of the device, as in `cuda`.
        where: dotted path of the settings, for messages.

    Raises:
        ConfigError: the target and the levels do not allow the search.
    """
    space = planned_space(variants, settings.target, settings.group_rule, where)
    units, ran = space.units, kept_share(space, shape.blocks)
    sharing = Sharing.of([unit.block for unit in units], [unit.group for unit in units], shape.blocks)
    memory = divide_memory(
        memory_gb, shape.outside * shape.itemsize, shape.hidden_size, shape.vocab_size, shape.itemsize, device
    )
    steps = _steps(shape, sharing, settings, text.sequence_length, memory)
    even = even_candidate(space)
    compressed = [(unit, level) for unit, level in zip(units, even, strict=True) if not unit.modules]
    all_units = sum(unit.parameters for unit, _ in compressed) * shape.itemsize
    packing = sum(unit.levels[level].bytes for unit, level in compressed) / max(1, all_units)
    dense, streamed = _dense_layers(shape, variants, memory)
    working_set = all_units * (1 + max(step.changed for step in steps) / len(units))
    kept = working_set <= memory.weights - (max(dense) if streamed else sum(dense))
    if not compressed:  # candidates of dropped modules use the dense weights
        working_set, kept = sum(dense), not streamed
    unpacked = _unpacked(steps, all_units, len(units), kept)
    candidate_tokens = sum(step.candidates * step.tokens for step in steps)
    block_tokens = sum(step.share * step.candidates * step.tokens for step in steps) * shape.blocks * ran.blocks
    teacher = 0 if settings.fitness == "perplexity" else 1
    head_tokens = sum((step.candidates + teacher) * step.tokens for step in steps)
    passes = sum(step.passes for step in steps)
    read = sum(step.tokens for step in steps) * shape.hidden_size * shape.itemsize * teacher
    available = float(text.tokens or math.nan)
    starts = _start_tokens(settings, len(units), even_fits=space.fits(even))
    block_flops = shape.block_flops(text.sequence_length)
    return SearchWork(
        generations=settings.generations,
        steps=steps,
        candidate_tokens=candidate_tokens,
        block_tokens=block_tokens,
        block_tokens_alone=candidate_tokens * shape.blocks * ran.blocks,
        head_tokens=head_tokens,
        unpacked_bytes=unpacked,
        moved_bytes=unpacked * packing + passes * sum(dense) * streamed + read,
        flops=block_tokens / ran.blocks * ran.arithmetic * block_flops + head_tokens * shape.head_flops,
        start_flops=(starts * ran.arithmetic + available * teacher) * shape.blocks * block_flops
        + starts * shape.head_flops,
        start_unpacked_bytes=all_units if kept else 0,
        working_set=working_set,
        kept=kept,
        teacher_bytes=available * shape.hidden_size * shape.itemsize * teacher,
        teacher_logits_bytes=available * shape.vocab_size * shape.itemsize * teacher,
        memory_bytes=_peak(shape, memory, steps, sum(dense) + _all_levels(space, shape), text.sequence_length),
    )


def _steps(
    shape: ModelShape, sharing: Sharing, settings: EvolutionSettings, length: int, memory: MemoryPlan
) -> tuple[StepWork, ...]:
    """Steps with the candidates that reach them; the parent is judged in the last one only."""
    steps = []
    counts = [settings.offspring, *settings.survivors[:-1]]
    for number, (count, tokens) in enumerate(zip(counts, settings.tokens, strict=True)):
        parent = number == len(counts) - 1
        together = count + parent
        passes, hidden = _passes(shape, _minibatch(tokens, length), together, memory)
        share = sharing.share(count, parent=parent)
        steps.append(StepWork(together, tokens, share, passes, sharing.changed(count), hidden))
    return tuple(steps)


def _minibatch(tokens: int, length: int) -> Minibatch:
    """Whole sequences, the last one cut to fit."""
    count = -(-tokens // length)
    return Minibatch(tuple(range(count)), (length,) * (count - 1) + (tokens - (count - 1) * length,))


def _passes(shape: ModelShape, minibatch: Minibatch, candidates: int, memory: MemoryPlan) -> tuple[int, int]:
    """Chunks into which candidates and sequences are cut, and bytes of hidden states before and after a block."""
    passes = most = 0
    for start, end, length in minibatch.segments():
        room = memory.states(length, shape.hidden_size, shape.itemsize)
        part = min(candidates, room)
        sequences = min(max(1, room // part), end - start)
        passes += -(-(end - start) // sequences) * -(-candidates // part)
        most = max(most, 2 * part * sequences * length * shape.hidden_size * shape.itemsize)
    return passes, most


def _dense_layers(shape: ModelShape, variants: pd.DataFrame, memory: MemoryPlan) -> tuple[list[int], bool]:
    """Bytes of each block that keeps a dense linear layer (else 0), and whether they are streamed."""
    compressed = set(variants["name"])
    keeps = shape.layers[~shape.layers["name"].isin(compressed)]["block"].unique()
    dense = [shape.block_bytes if block in keeps else 0 for block in range(shape.blocks)]
    return dense, sum(dense) > memory.weights // 2


def _unpacked(steps: tuple[StepWork, ...], all_units: int, units: int, kept: bool) -> float:
    """Bytes unpacked in a generation: what changes if the rest is kept, else everything in every pass."""
    if kept:
        return all_units * steps[0].changed / units
    return sum(step.passes * all_units * (1 + step.changed / units) for step in steps)


def _all_levels(space: Space, shape: ModelShape) -> int:
    """Bytes of all variants, unpacked: what a long search would keep if there were room."""
    layers = [unit for unit in space.units if not unit.modules]
    return sum(unit.parameters * len(unit.levels) for unit in layers) * shape.itemsize


def _peak(shape: ModelShape, memory: MemoryPlan, steps: tuple[StepWork, ...], weights: float, length: int) -> float:
    """Bytes outside the blocks, kept weights, hidden states, and what lives while a block or the head runs."""
    run = max(memory.run_tokens, length) * ACTIVATION_WIDTH * shape.hidden_size * shape.itemsize
    score = memory.score_tokens * shape.vocab_size * score_bytes(shape.itemsize)
    held = max(min(weights, memory.weights), shape.block_bytes) + max(step.hidden_bytes for step in steps)
    return shape.outside * shape.itemsize + held + max(run, score)


def _start_tokens(settings: EvolutionSettings, units: int, *, even_fits: bool) -> int:
    """Tokens that candidates run before the first generation, at most."""
    starts = 1 if even_fits else settings.initial_candidates
    if settings.start == "even":
        return 0 if even_fits else starts * settings.initial_tokens
    alone = (2 * units + 1) * settings.sensitivity_tokens  # the dense model, and each unit at two levels
    return alone + (starts + 1) * settings.initial_tokens
