"""The maps of the report: searches side by side, with one scale for each kind of level."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import EFFECTS, VARIANTS, read_provenance, read_table, settings_of
from evopress.compression.families import DROP, family_of, of_modules
from evopress.export.level_map import (
    LevelScale,
    NumberScale,
    letters_of,
    level_svg,
    number_svg,
    shown_levels,
)
from evopress.models.modules import EMBEDDING, OUTER
from evopress.search.configuration import Configuration
from evopress.search.strategies import STRATEGIES


@dataclass(frozen=True)
class Panel:
    """The map of one search."""

    name: str
    svg: Markup | None
    text: str
    """What is said in place of a map, or below it."""


@dataclass(frozen=True)
class Maps:
    """Maps that share a scale."""

    title: str
    caption: str
    legend: list[tuple[str, str]]
    """Colours and what they stand for; empty where there is no map."""
    panels: list[Panel]


def level_maps(configurations: Mapping[str, pd.DataFrame]) -> list[Maps]:
    """Levels of all searches (columns of CONFIGURATION, by name), a group for each family."""
    groups: dict[str, dict[str, pd.DataFrame]] = {}
    for search, table in configurations.items():
        groups.setdefault(family_of(table).name, {})[search] = table
    return [_of_family(name, members) for name, members in groups.items()]


def _of_family(name: str, members: Mapping[str, pd.DataFrame]) -> Maps:
    shown = {search: shown_levels(table, short=True) for search, table in members.items()}
    scale = LevelScale.of(shown.values())
    panels = [_level_panel(search, table, shown[search], scale) for search, table in members.items()]
    legend = scale.legend if any(panel.svg for panel in panels) else []
    return Maps(f"Levels: {name}", family_of(next(iter(members.values()))).level_map, legend, panels)


def _level_panel(search: str, table: pd.DataFrame, shown: pd.DataFrame, scale: LevelScale) -> Panel:
    levels = sorted(set(shown["level"]))
    if len(levels) == 1:
        return Panel(search, None, f"Every layer is at level {levels[0]}.")
    svg = Markup(level_svg(shown, scale, search))  # noqa: S704 (matplotlib escapes)
    return Panel(search, svg, _key(table).strip())


def _key(configuration: pd.DataFrame) -> str:
    """Sentences on what else the map shows, where there are several variants."""
    letters = letters_of(configuration)
    told = ", ".join(f"{letter} is {name}" for name, letter in letters.items())
    words = [f" Letters stand for variants: {told}."] if letters else []
    modules = of_modules(configuration)
    if modules.any() and not modules.all():
        words.append(f" Modules dropped: {int((configuration['level'][modules] == DROP).sum())}.")
    return "".join(words)


def error_maps(run: Run, configurations: Mapping[str, pd.DataFrame]) -> list[Maps]:
    """Error of every layer at the level that each search chose, as far as tables of variants know it."""
    tables = {search: chosen_errors(run, table) for search, table in configurations.items()}
    tables = {search: table for search, table in tables.items() if len(table)}
    caption = (
        "What each layer alone does to its own output at the level that was chosen: the squared error as a share of "
        "the output, over the calibration text. Errors of layers do not add up to that of the model."
    )
    return _number_maps("Errors of layers", caption, tables)


def effect_maps(run: Run, configurations: Mapping[str, pd.DataFrame]) -> list[Maps]:
    """What each layer alone does to the model, as far as these searches started from that and it is still there.

    Raises:
        ArtifactError: a table is damaged or of another model.
    """
    if not configurations:
        return []
    places = pd.concat([table[["unit", "layer", "block"]] for table in configurations.values()]).drop_duplicates()
    asked = {effects_of(settings_of(run.configuration(search))) for search in configurations} - {None}
    there = [name for name in sorted(map(str, asked)) if run.effects(name).exists()]
    tables = {name: _effects(run, name).merge(places, on="unit") for name in there}
    caption = (
        "By how much the model gets worse where one layer alone is compressed, to the middle one of its levels that "
        "are worth their cost, and all others are dense. Layers that share a level are measured together, and shown by "
        "the first; where nothing could be told from noise, the map is empty."
    )
    return _number_maps("Single effects", caption, tables)


def effects_of(settings: Mapping[str, object]) -> str | None:
    """Name of the single effects that a search of these settings started from."""
    effects = STRATEGIES.parse(settings, "settings").effects()
    return None if effects is None else effects.name


def _effects(run: Run, name: str) -> pd.DataFrame:
    """Columns `unit`, the first of layers that share a level, and `value`."""
    path = run.effects(name)
    require_same_model(run, read_provenance(path), path)
    table = read_table(path, EFFECTS)
    middle = table.drop_duplicates("unit")  # some are measured at a lower level as well
    return pd.DataFrame({"unit": middle["unit"].str.partition("+")[0], "value": middle["fitness"]})


def _number_maps(title: str, caption: str, tables: Mapping[str, pd.DataFrame]) -> list[Maps]:
    """Maps of columns `layer`, `block` and `value`, by what the map is of; none where no value is above 0."""
    values = [value for table in tables.values() for value in table["value"] if value > 0 and math.isfinite(value)]
    if not values:
        return []
    scale = NumberScale(min(values), max(values))
    panels = [
        Panel(name, Markup(number_svg(table, scale, f"{title} {name}")), "")  # noqa: S704 (matplotlib escapes)
        for name, table in tables.items()
        if len(table)
    ]
    return [Maps(title, caption, scale.legend, panels)]


def chosen_errors(run: Run, configuration: pd.DataFrame) -> pd.DataFrame:
    """Columns `layer`, `block` and `value`, the error, of the layers whose variants are there."""
    known = pd.DataFrame(_variants(run, configuration), columns=["variants", "unit", "level", "value"])
    columns = ["variants", "unit", "level", "layer", "block"]
    errors = configuration[columns].merge(known, on=["variants", "unit", "level"])
    return errors[["layer", "block", "value"]].dropna()


def _variants(run: Run, chosen: pd.DataFrame) -> Iterable[tuple[str, str, str, float]]:
    parts = chosen["block"].astype(object).where(~chosen["layer"].isin(OUTER), EMBEDDING)
    for name, part in chosen[["variants"]].assign(part=parts).drop_duplicates().itertuples(index=False):
        path = run.variant_table(str(name), part)
        if path.exists():  # modules have none
            rows = read_table(path, VARIANTS)
            yield from zip([name] * len(rows), rows["name"], rows["level"], rows["error"], strict=True)


def configurations_of(run: Run, searches: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Tables of what was chosen, by search."""
    return {search: Configuration.read(run, search).table for search in searches}
