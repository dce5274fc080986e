"""A text configuration against a search space: names, levels, number of blocks and budget."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice

import numpy as np

from evopress.compression.families import DROP, KEEP
from evopress.search.space import Candidate, Space, Unit
from evopress.search.text_format import LayerLine, parse_drops, parse_levels, shown
from evopress.util.errors import ConfigError

_MOST_PROBLEMS = 5


def match(text: str, space: Space, blocks: int, where: str) -> Candidate:
    """The candidate that a text names, whatever it costs; the units of the space tell which format it has.

    Args:
        text: of either format (`configurations.text`).
        space: the units.
        blocks: number of blocks of the model.
        where: what messages start with, as in `searches.mine.file: levels.txt`.

    Raises:
        ConfigError: the text is of another format or does not fit the model; the message names the line.
    """
    if any(unit.modules for unit in space.units):
        return _match_drops(parse_drops(text, where), space, blocks, where)
    return _match_levels(parse_levels(text, where), space, where)


def require_budget(space: Space, candidate: Candidate, target: float, where: str) -> None:
    """Refuse a candidate that costs more than the target allows; who may trade with whom does not matter.

    Raises:
        ConfigError: with how much is too much.
    """
    excess = space.cost_of(candidate) - space.budget
    if excess <= 0:
        return
    how_much = space.family.excess(excess, space.units, target)
    raise ConfigError(f"{where}: {how_much}; set another target, or choose another file")


def _match_levels(lines: Sequence[LayerLine], space: Space, where: str) -> Candidate:
    number_of = {unit.name: number for number, unit in enumerate(space.units)}
    _refuse(f"{where}, line {line.line}: {_unknown(line, number_of)}" for line in lines if line.layer not in number_of)
    missing = [name for name in number_of if name not in {line.layer for line in lines}]
    _refuse(f"{where}: has no level for {name}" for name in missing)
    candidate = np.full(len(space.units), -1, dtype=np.int16)
    for line in lines:
        candidate[number_of[line.layer]] = _level(space.units[number_of[line.layer]], line.level)
    unmade = [line for line in lines if candidate[number_of[line.layer]] < 0]
    _refuse(
        f"{where}, line {line.line}: {line.layer} has no level {line.level}; there are "
        + ", ".join(level.label for level in space.units[number_of[line.layer]].levels)
        for line in unmade
    )
    return candidate


def _unknown(line: LayerLine, known: Iterable[str]) -> str:
    near = get_close_matches(line.layer[:200], known, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else "is this a configuration of another model, or is the layer excluded?"
    return f"no searched layer is named {shown(line.layer)}: {hint}"


def _level(unit: Unit, asked: str) -> int:
    """Number of the level with this label, or with another spelling of it (3, +3); -1 if there is none."""
    spellings = {asked} if ":" in asked else {str(int(asked)), f"{int(asked):+d}"}
    return next((number for number, level in enumerate(unit.levels) if level.label in spellings), -1)


def _match_drops(dropped: Sequence[frozenset[str]], space: Space, blocks: int, where: str) -> Candidate:
    if len(dropped) != blocks:
        raise ConfigError(
            f"{where}, line {len(dropped)}: is the last, but the model has {blocks} blocks, which take a line each"
        )
    _refuse(_cannot_stay_apart(dropped, space, where))
    offered = {module for unit in space.units for module in unit.modules}
    asked = [(block, kind) for block, kinds in enumerate(dropped) for kind in sorted(kinds)]
    _refuse(
        f"{where}, line {block + 1}: the {kind} module of this block may not be dropped; the variants exclude it"
        for block, kind in asked
        if (block, kind) not in offered
    )
    labels = [DROP if _count(unit, dropped) else KEEP for unit in space.units]
    levels = [[level.label for level in unit.levels] for unit in space.units]
    return np.array([known.index(label) for known, label in zip(levels, labels, strict=True)], dtype=np.int16)


def _cannot_stay_apart(dropped: Sequence[frozenset[str]], space: Space, where: str) -> Iterator[str]:
    """Units of several modules of which the text drops some only."""
    for unit in space.units:
        if 0 < _count(unit, dropped) < len(unit.modules):
            lines = sorted({block + 1 for block, _ in unit.modules})
            named = " and ".join(f"{block}.{kind}" for block, kind in unit.modules)
            yield f"{where}, line {lines[0]}: drops a part of {unit.name}, but {named} stay or go together here"


def _count(unit: Unit, dropped: Sequence[frozenset[str]]) -> int:
    return sum(kind in dropped[block] for block, kind in unit.modules)


def _refuse(problems: Iterable[str]) -> None:
    """Raise an error of the first problems, if there are any, one a line."""
    rest = iter(problems)
    if first := list(islice(rest, _MOST_PROBLEMS)):
        more = sum(1 for _ in rest)
        raise ConfigError("\n".join([*first, f"... and {more} more" if more else ""]).rstrip())
