"""What a configuration comes to, in a line or two."""

from collections import Counter

from evopress.plan.text import amount
from evopress.search.space import Candidate, Space


def facts_of(space: Space, candidate: Candidate, target: float) -> list[str]:
    """Units, what they come to and the target; then, of linear layers, how many have each level.

    Args:
        space: the units.
        candidate: [units].
        target: of the search.
    """
    facts = space.family.facts(space.units, candidate.tolist(), target)
    if space.family.takes_modules:
        return [facts]
    levels = [unit.levels[level] for unit, level in zip(space.units, candidate, strict=True)]
    counts = Counter(level.label for level in levels)
    by_level = ", ".join(f"{label}: {counts[label]}" for label in sorted(counts, key=_order))
    packed = sum(level.bytes for level in levels)
    return [f"{facts}, {amount(packed, 'B')} packed", f"layers by level: {by_level}"]


def _order(label: str) -> tuple[int, int, str]:
    """Bit-widths and steps by their number; labels that are none, such as patterns, before them by their text."""
    return (1, int(label), label) if label.removeprefix("-").removeprefix("+").isdigit() else (0, 0, label)
