"""What a configuration comes to, in a line or two."""

from collections import Counter

from evopress.plan.text import amount
from evopress.search.problem import SearchProblem
from evopress.search.space import Candidate
from evopress.search.target import SizeTarget, target_text


def facts_of(problem: SearchProblem, candidate: Candidate, target: float | SizeTarget) -> list[str]:
    """What the units come to and the target; then how many of them have each level.

    Args:
        problem: units and family.
        candidate: [units].
        target: of the search.
    """
    units = problem.space.units
    facts = problem.family.facts(units, candidate.tolist(), target_text(target))
    if problem.family.takes_modules:
        return [facts]
    levels = [layer.levels[level] for unit, level in zip(units, candidate, strict=True) for layer in unit.layers]
    counts = Counter(level.label for level in levels)
    by_level = ", ".join(f"{label}: {counts[label]}" for label in sorted(counts, key=_order))
    packed = sum(level.bytes for level in levels)
    return [f"{facts}, {amount(packed, 'B')} packed", f"layers by level: {by_level}"]


def _order(label: str) -> tuple[int, int, str]:
    """Bit-widths and steps by their number; labels that are none, such as patterns, before them by their text."""
    return (1, int(label), label) if label.removeprefix("-").removeprefix("+").isdigit() else (0, 0, label)
