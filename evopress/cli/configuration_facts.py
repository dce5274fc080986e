"""What a configuration comes to, in a line or two."""

from collections import Counter

from evopress.plan.text import amount
from evopress.search.problem import SearchProblem
from evopress.search.space import Candidate


def facts_of(problem: SearchProblem, candidate: Candidate, target: float) -> list[str]:
    """What the units come to and the target; then how many of them have each level.

    Args:
        problem: units and family.
        candidate: [units].
        target: of the search.
    """
    levels = [unit.levels[index] for unit, index in zip(problem.space.units, candidate, strict=True)]
    packed, counts = sum(level.bytes for level in levels), Counter(level.label for level in levels)
    by_level = ", ".join(f"{label}: {counts[label]}" for label in sorted(counts, key=_order))
    return [
        f"{problem.describe(candidate)} (target {target:g}), {amount(packed, 'B')} packed",
        f"units by level: {by_level}",
    ]


def _order(label: str) -> tuple[int, int, str]:
    """Bit-widths and steps by their number; other labels, which are none, by their text."""
    number = label.lstrip("+-")
    return (1, int(label), "") if number.isdigit() else (0, 0, label)
