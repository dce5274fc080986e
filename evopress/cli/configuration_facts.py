"""What a configuration comes to, in a line or two."""

from collections import Counter
from collections.abc import Iterable

from evopress.compression.measure import DROP, average
from evopress.plan.text import amount
from evopress.search.space import Candidate, Level, Space, Unit
from evopress.search.text_match import space_measure


def facts_of(space: Space, candidate: Candidate, target: float) -> list[str]:
    """Units, what they come to and the target; then how many units have each level.

    Args:
        space: the units.
        candidate: [units].
        target: of the search.
    """
    chosen = [(unit, unit.levels[level]) for unit, level in zip(space.units, candidate, strict=True)]
    if space_measure(space) == "depth":
        return [f"{_drops(chosen)}; the target is {target:g} blocks"]
    return [_levels(space, candidate, target), _counts(level for _, level in chosen)]


def _drops(chosen: list[tuple[Unit, Level]]) -> str:
    dropped = [module for unit, level in chosen if level.label == DROP for module in unit.modules]
    kinds = Counter(kind for _, kind in dropped)
    modules_of = Counter(block for block, _ in dropped)
    whole = sum(count == 2 for count in modules_of.values())
    return f"drops {kinds['attn']} attention and {kinds['mlp']} MLP modules, {whole} blocks whole"


def _levels(space: Space, candidate: Candidate, target: float) -> str:
    measure = space_measure(space)
    reached = average(measure, space.cost_of(candidate), sum(unit.parameters for unit in space.units))
    what = "bits per weight" if measure == "bits" else "of the weights zero"
    packed = sum(unit.levels[level].bytes for unit, level in zip(space.units, candidate, strict=True))
    return f"{len(candidate)} layers, {reached:.6g} {what} on average (target {target:g}), {amount(packed, 'B')} packed"


def _counts(levels: Iterable[Level]) -> str:
    counts = Counter(level.label for level in levels)
    return "layers by level: " + ", ".join(f"{label}: {counts[label]}" for label in sorted(counts, key=_order))


def _order(label: str) -> tuple[int, str]:
    """Bit-widths and steps by their number; patterns, which are none, by their text."""
    return (0, label) if ":" in label else (int(label), label)
