"""A configuration: one level for each unit, as a table, as a candidate of a search space, or as text.

The only place that turns one of these forms into another. The table is what a search leaves; the texts are those that
are published with the paper (`text_format`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evopress.artifacts.paths import EMBEDDING, Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import CONFIGURATION, LAYERS, read_provenance, read_table
from evopress.compression.base import Level, Unit
from evopress.compression.families import DROP, KEEP, family_of
from evopress.compression.joint import own_label
from evopress.models.modules import module_kind
from evopress.search.candidates import uniform_start
from evopress.search.problem import SearchProblem
from evopress.search.space import Candidate, Space
from evopress.search.target import SizeTarget, megabytes
from evopress.search.text_format import LayerLine, format_drops, format_levels, parse_drops, parse_levels, shown
from evopress.util.errors import ArtifactError, ConfigError

_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class Configuration:
    """The levels of all units, layers or modules."""

    table: pd.DataFrame
    """CONFIGURATION schema."""

    @classmethod
    def read(cls, run: Run, search: str) -> "Configuration":
        """What a search chose.

        Raises:
            ArtifactError: missing, damaged, empty, or made for another model.
        """
        path = run.configuration(search)
        table = read_table(path, CONFIGURATION)
        require_same_model(run, read_provenance(path), path)
        if table.empty:
            raise ArtifactError(f"{path}: holds no unit; delete it and run the search again")
        return cls(table)

    @classmethod
    def of_candidate(cls, problem: SearchProblem, candidate: Candidate) -> "Configuration":
        """The levels of a candidate [units]; a unit of several modules or layers is a row for each of them.

        Layers of modules that are dropped have no level, and no row.
        """
        chosen = list(zip(problem.space.units, candidate.tolist(), strict=True))
        gone = {module for unit, index in chosen if not index for module in unit.modules}
        rows = [
            _row(problem, layer.name, layer.block, layer.layer, layer.parameters, level.bytes, level)
            for unit, index in chosen
            if not unit.modules
            for layer in unit.layers
            if (layer.block, module_kind(layer.layer)) not in gone
            for level in [layer.levels[index]]
        ]
        of_unit = {unit.name: unit.levels[index] for unit, index in chosen}
        for each in [] if problem.modules is None else problem.modules.to_dict("records"):
            level = of_unit[each["unit"]]
            size = each["bytes"] * level.cost
            rows.append(_row(problem, each["name"], each["block"], each["module"], each["parameters"], size, level))
        return cls(pd.DataFrame(rows, columns=CONFIGURATION.names))

    def nearest(self, space: Space) -> Candidate:
        """What it comes to in a space, whatever that costs.

        A layer gets its level of nearest value, of equals the one of the same name, as the space may have other levels;
        where it is missing, its uniform one. Layers that share a level get the one nearest to their mean. A unit of
        modules is dropped if all of them are. Of several variants, a layer gets its very level, or the one whose bytes
        are nearest.
        """
        if space.is_joint:
            return self._nearest_of_several(space)
        chosen = zip(self.table["value"], self.table["level"], strict=True)
        own = dict(zip(self.table["unit"], chosen, strict=True))
        gone = set(self._dropped())
        candidate = uniform_start(space)
        for number, unit in enumerate(space.units):
            if unit.modules:
                candidate[number] = 0 if gone.issuperset(unit.modules) else space.top[number]
            elif known := [layer for layer in unit.layers if layer.name in own]:
                value, label = own[known[0].name]
                if len(known) > 1:
                    weights = [each.parameters for each in known]
                    value = float(np.average([own[each.name][0] for each in known], weights=weights))
                distances = [(abs(level.value - value), level.label != label) for level in unit.levels]
                candidate[number] = distances.index(min(distances))
        return candidate

    def _nearest_of_several(self, space: Space) -> Candidate:
        own = {row["unit"]: row for row in self.table.to_dict("records")}
        gone = set(self._dropped())
        candidate = uniform_start(space)
        for number, unit in enumerate(space.units):
            rows = [own[layer.name] for layer in unit.layers if layer.name in own]
            if unit.modules:
                candidate[number] = 0 if gone.issuperset(unit.modules) else space.top[number]
            elif rows:
                chosen, size = (rows[0]["variants"], rows[0]["level"]), sum(row["bytes"] for row in rows)
                distances = [((each.source, own_label(each)) != chosen, abs(each.bytes - size)) for each in unit.levels]
                candidate[number] = distances.index(min(distances))
        return space.canonical(candidate)

    def text(self, run: Run) -> str:
        """Text in the published format: of levels, layer by layer, or of dropped modules, block by block of the model.

        Raises:
            ArtifactError: the table of layers, which tells how many blocks there are, is missing or damaged.
            ConfigError: levels are of several variants.
        """
        if len(names := self.table["variants"].unique()) > 1:
            raise ConfigError(
                f"levels are of several variants ({', '.join(names)}), which the text formats published with the paper "
                "cannot say; take them from `configuration.parquet`"
            )
        if family_of(self.table).takes_modules:
            dropped = list(self._dropped())
            blocks = int(read_table(run.layers, LAYERS)["block"].max()) + 1
            return format_drops([frozenset(kind for at, kind in dropped if at == block) for block in range(blocks)])
        return format_levels(zip(self.table["unit"], self.table["level"], strict=True))

    def made_by(self, run: Run) -> Iterator[tuple[str, Path]]:
        """Name of each folder of variants that it picks from, and a table there that records its settings."""
        for name, rows in self.table.groupby("variants"):
            if family_of(rows).takes_modules:
                yield str(name), run.module_table(str(name))
            else:
                blocks = sorted(int(block) for block in rows["block"] if block >= 0)
                yield str(name), run.variant_table(str(name), blocks[0] if blocks else EMBEDDING)

    def _dropped(self) -> Iterator[tuple[int, str]]:
        """Modules that are dropped, as (block, kind)."""
        rows = self.table[self.table["level"] == DROP]
        return zip(rows["block"].tolist(), rows["layer"].tolist(), strict=True)


def _row(
    problem: SearchProblem, name: str, block: int, layer: str, parameters: int, size: int, level: Level
) -> dict[str, Any]:
    """A row of a configuration."""
    family = problem.families[level.source] if level.source else problem.family
    return {
        "unit": name,
        "block": block,
        "layer": layer,
        "variants": level.source or problem.variants,
        "family": family.name,
        "level": own_label(level),
        "value": level.value,
        "cost": level.cost,
        "parameters": parameters,
        "bytes": size,
    }


def require_budget(problem: SearchProblem, candidate: Candidate, target: float | SizeTarget, where: str) -> None:
    """Refuse a candidate that costs more than the target allows; who may trade with whom does not matter.

    Raises:
        ConfigError: with how much is too much.
    """
    excess = problem.space.cost_of(candidate) - problem.space.budget
    if excess > 0:
        if isinstance(target, SizeTarget):
            how_much = f"{megabytes(excess)} above the target of {target}"
        else:
            how_much = problem.family.excess(excess, problem.space.units, target)
        raise ConfigError(f"{where}: {how_much}; set another target, or choose another configuration")


# --- from text -------------------------------------------------------------------------------------------------------


def parse_candidate(text: str, space: Space, blocks: int, where: str) -> Candidate:
    """The candidate that a text names, whatever it costs; the units of the space tell which format it has.

    Args:
        text: of either format (`text_format`).
        space: the units.
        blocks: number of blocks of the model.
        where: what messages start with, as in `searches.mine.file: levels.txt`.

    Raises:
        ConfigError: the text is of another format or does not fit the model; the message names the line.
    """
    if any(unit.modules for unit in space.units):
        return _match_drops(parse_drops(text, where), space, blocks, where)
    return _match_levels(parse_levels(text, where), space, where)


def _match_levels(lines: Sequence[LayerLine], space: Space, where: str) -> Candidate:
    number_of = {layer.name: number for number, unit in enumerate(space.units) for layer in unit.layers}
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
    _refuse(_of_several_levels(lines, space, number_of, where))
    return candidate


def _of_several_levels(
    lines: Sequence[LayerLine], space: Space, number_of: Mapping[str, int], where: str
) -> Iterator[str]:
    """Lines that give a layer another level than one with which it shares its level has."""
    first: dict[int, LayerLine] = {}
    for line in lines:
        before = first.setdefault(number_of[line.layer], line)
        unit = space.units[number_of[line.layer]]
        if _level(unit, before.level) != _level(unit, line.level):
            yield (
                f"{where}, line {line.line}: {line.layer} is at {line.level} and {before.layer} at {before.level}, but "
                "they share a level here"
            )


def _unknown(line: LayerLine, known: Iterable[str]) -> str:
    near = get_close_matches(line.layer[:200], known, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else "is this a configuration of another model, or is the layer excluded?"
    return f"no searched layer is named {shown(line.layer)}: {hint}"


def _level(unit: Unit, asked: str) -> int:
    """Number of the level with this label, or with another spelling of it (3, +3); -1 if there is none."""
    number = asked.removeprefix("-").removeprefix("+")
    spellings = {str(int(asked)), f"{int(asked):+d}"} if number.isdigit() else {asked}
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
