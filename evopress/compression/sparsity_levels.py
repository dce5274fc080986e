"""Which sparsities a layer is offered: exact numbers of weights to remove, so that layers of different size trade.

As in EvoPress (arXiv 2410.14649, section 4.2), neighbouring levels of every layer differ by the same number of
weights. Level 0 is the target sparsity; "+3" removes three steps more, "-3" three steps fewer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from evopress.compression.settings import parse_pattern, step_label
from evopress.util.errors import CompressionError


@dataclass(frozen=True)
class SparsityLevel:
    """How many weights of a layer go, and which structure they keep to."""

    label: str
    """Signed steps from the target, or the pattern."""
    removed: int
    """Weights of the layer that become zero."""
    pattern: tuple[int, int] | None = None
    """n of every m neighbouring inputs are kept; None is anywhere in the layer."""


def unstructured_levels(parameters: int, target: float, step: int, each_way: int) -> list[SparsityLevel]:
    """Levels from the densest to the sparsest; at least one weight of the layer stays, at least none goes.

    Level 0 removes the least number of weights that reaches the target, so a model at level 0 everywhere never exceeds
    its budget. A layer without room for a step either way has level 0 alone.

    Args:
        parameters: weights of the layer.
        target: sparsity of level 0, strictly between 0 and 1.
        step: weights between two levels.
        each_way: levels on either side of the target, at most.

    Raises:
        CompressionError: not even level 0 leaves the layer a weight.
    """
    centre = removed_at(parameters, target)
    if centre >= parameters:
        raise CompressionError(
            f"sparsity {target} leaves nothing of a layer of {parameters} weights; lower it or exclude the layer"
        )
    counts = {steps: centre + steps * step for steps in range(-each_way, each_way + 1)}
    return [SparsityLevel(step_label(steps), removed) for steps, removed in counts.items() if 0 <= removed < parameters]


def removed_at(parameters: int, sparsity: float) -> int:
    """The exact least number of weights whose removal reaches ``sparsity``, taken as it is written in decimal."""
    return math.ceil(Fraction(str(sparsity)) * parameters)


def pattern_levels(parameters: int, columns: int, patterns: Sequence[str]) -> list[SparsityLevel]:
    """One level per n:m pattern, from the densest to the sparsest.

    Raises:
        CompressionError: a pattern does not divide the layer's inputs.
    """
    levels = []
    for pattern in patterns:
        keep, of = parse_pattern(pattern)
        if columns % of:
            raise CompressionError(
                f"pattern {pattern} needs inputs in multiples of {of}, but there are {columns}; exclude the layer"
            )
        levels.append(SparsityLevel(pattern, parameters // of * (of - keep), (keep, of)))
    return sorted(levels, key=lambda level: level.removed)


def portions(total: int, parts: Sequence[int]) -> list[int]:
    """Cut ``total`` into whole shares that sum to it, each less than 1 away from being proportional to its part."""
    return list(_portions(total, parts))


def _portions(total: int, parts: Sequence[int]) -> Iterator[int]:
    whole, before, given = sum(parts), 0, 0
    for part in parts:
        before += part
        reached = total * before // whole
        yield reached - given
        given = reached
