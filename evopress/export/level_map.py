"""Maps of a model's layers, one column a block: the level of each, or a number of each, such as its error.

Input embedding and head, which are in no block, have a row of one cell each, above and below. Maps of several searches
share a scale, so that a colour means the same in all of them. The report shows them side by side; a model card has its
own as a picture beside it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from evopress.compression.families import DROP, of_modules
from evopress.models.modules import EMBEDDING, HEAD, OUTER, module_kind
from evopress.util.figures import STYLE, to_png, to_svg


def shown_levels(configuration: pd.DataFrame, *, short: bool = False) -> pd.DataFrame:
    """Rows of a configuration to show: those of layers, or of modules where layers have no levels.

    Where layers have levels of several variants, a level is shown with their name, and its value is the bits that a
    weight takes as stored. Layers of dropped modules are rows of their own: at the level `drop`, without a value.

    Args:
        configuration: columns of CONFIGURATION.
        short: whether letters stand for the names of variants (`letters_of`).
    """
    modules = of_modules(configuration)
    if modules.all():
        return configuration
    shown = configuration[~modules].copy()
    names = letters_of(configuration)
    if names:
        prefixes = shown["variants"].map(names if short else {name: f"{name} " for name in names})
        shown["level"] = prefixes + shown["level"]
        shown["value"] = 8 * shown["bytes"] / shown["parameters"]
    gone = _gone(configuration[modules], shown)
    return pd.concat([shown, gone], ignore_index=True) if len(gone) else shown


def letters_of(configuration: pd.DataFrame) -> dict[str, str]:
    """Letters for the variants of layers, by their names; none where there is only one."""
    names = sorted(configuration[~of_modules(configuration)]["variants"].unique())
    return {name: chr(ord("a") + number) for number, name in enumerate(names)} if len(names) > 1 else {}


def _gone(modules: pd.DataFrame, shown: pd.DataFrame) -> pd.DataFrame:
    """Layers of dropped modules: those that the other blocks have in modules of their kind."""
    layers = [layer for layer in dict.fromkeys(shown["layer"]) if layer not in OUTER]
    dropped = modules[modules["level"] == DROP]
    rows = [
        {"block": block, "layer": layer, "level": DROP, "value": float("nan")}
        for block, kind in zip(dropped["block"], dropped["layer"], strict=True)
        for layer in layers
        if module_kind(layer) == kind
    ]
    return pd.DataFrame(rows, columns=["block", "layer", "level", "value"])


GONE = "#b8bec8"
"""Colour of layers of dropped modules, beside layers that have levels."""
MOST_NAMED = 12
"""Levels that a legend names, at most; of more, evenly spaced ones."""
Colour = tuple[float, float, float, float]
"""Red, green, blue and opacity, from 0 to 1."""
_EMPTY: Colour = (0.0, 0.0, 0.0, 0.0)
_WIDTH = 5.6
_GAP = 0.25
"""Rows between the layers of blocks and those of none."""
_SAMPLES = 5
"""Numbers that a legend of numbers names."""
_TICKS = 12
"""Blocks that are numbered below a map, at most."""


@dataclass(frozen=True)
class LevelScale:
    """A colour for each value of a level; labels of one value share it."""

    labels: Mapping[float, str]
    """By rising value."""
    drops: bool = False
    """Whether layers may be gone, which have no value."""

    @classmethod
    def of(cls, shown: Iterable[pd.DataFrame]) -> "LevelScale":
        """The scale of all levels in some tables of `shown_levels`."""
        tables = list(shown)
        pairs = {pair for table in tables for pair in zip(table["value"], table["level"], strict=True)}
        values = sorted({float(value) for value, _ in pairs if not math.isnan(value)})
        labels = {value: ", ".join(sorted(str(label) for own, label in pairs if own == value)) for value in values}
        return cls(labels, any(math.isnan(value) for value, _ in pairs))

    @property
    def colours(self) -> dict[float, str]:
        """Colour of each value, as in `#440154`: the brighter the higher."""
        drawn = colormaps["viridis"].resampled(max(2, len(self.labels)))
        return {value: to_hex(drawn(number)) for number, value in enumerate(self.labels)}

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Colour and label of the levels that a legend has room for."""
        named = [(self.colours[value], label) for value, label in self.labels.items()]
        return named[:: math.ceil(len(named) / MOST_NAMED)] + ([(GONE, "dropped")] if self.drops else [])


def level_svg(shown: pd.DataFrame, scale: LevelScale, name: str) -> str:
    """SVG of the level of every layer, without a legend.

    Args:
        shown: rows of a configuration, as `shown_levels` gives them.
        scale: knows all of its levels.
        name: what tells this SVG's internal names from those of others on the page.
    """
    with rc_context({**STYLE, "svg.hashsalt": f"levels {name}"}):
        return to_svg(_level_figure(shown, scale))


def level_png(configuration: pd.DataFrame) -> bytes:
    """The same of a configuration as a picture of its own, with a legend."""
    shown = shown_levels(configuration)
    scale = LevelScale.of([shown])
    with rc_context({**STYLE, "font.size": 8.0}):
        figure = _level_figure(shown, scale)
        patches = [Patch(color=colour, label=label) for colour, label in scale.legend]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(patches)), frameon=False)
        figure.set_size_inches(_WIDTH, figure.get_size_inches()[1] + 0.3)
        figure.set_dpi(160)
        return to_png(figure)


@dataclass(frozen=True)
class NumberScale:
    """Colours of numbers between two limits, both above 0: the darker the greater, by their logarithm."""

    low: float
    high: float

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Colours and numbers, evenly spaced."""
        drawn, numbers = colormaps["magma_r"], np.geomspace(self.low, self.high, _SAMPLES)
        shades = np.linspace(0, 1, _SAMPLES)
        return [(to_hex(drawn(shade)), f"{number:.1e}") for shade, number in zip(shades, numbers, strict=True)]


def number_svg(table: pd.DataFrame, scale: NumberScale, name: str) -> str:
    """SVG of a number of every layer, without a legend; what is not above 0 stays empty.

    Args:
        table: columns `layer`, `block` and `value`.
        scale: of all maps that are to share their colours.
        name: as of `level_svg`.
    """
    norm, colours = LogNorm(scale.low, max(scale.high, scale.low * 1.001)), colormaps["magma_r"]
    with rc_context({**STYLE, "svg.hashsalt": f"numbers {name}"}):
        return to_svg(_map_of(table, lambda value, _: colours(norm(value)) if value > 0 else _EMPTY))


def _level_figure(shown: pd.DataFrame, scale: LevelScale) -> Figure:
    colours = {value: to_rgba(colour) for value, colour in scale.colours.items()}

    def colour(value: float, level: object) -> Colour:
        """Colour of a level; what is dropped has one of its own."""
        gone = scale.drops and math.isnan(value) and level == DROP
        return to_rgba(GONE) if gone else colours.get(value, _EMPTY)

    return _map_of(shown, colour)


def _map_of(table: pd.DataFrame, colour: Callable[[float, object], Colour]) -> Figure:
    """A map: layers from top to bottom by the last part of their names, blocks from left to right.

    Args:
        table: columns `layer`, `block`, `value`, and `level` where layers have one.
        colour: of a value and its level (None where there is no such column).
    """
    inside, outside = table[~table["layer"].isin(OUTER)], table[table["layer"].isin(OUTER)]
    layers, blocks = list(dict.fromkeys(inside["layer"])), sorted(set(inside["block"]))
    tops = {EMBEDDING: 0.0} if EMBEDDING in set(outside["layer"]) else {}
    first = (1 + _GAP) * len(tops)
    tops |= {layer: first + row for row, layer in enumerate(layers)}
    tops |= {HEAD: first + len(layers) + _GAP} if HEAD in set(outside["layer"]) else {}
    figure, axes = _axes(tops, blocks)
    if layers:
        cells: Any = np.tile(np.array(_EMPTY), (len(layers), len(blocks), 1))
        for layer, block, shade in _shades(inside, colour):
            cells[layers.index(layer), blocks.index(block)] = shade
        rows = np.arange(len(layers) + 1) + first
        axes.pcolormesh(np.arange(len(blocks) + 1), rows, cells, edgecolors="white", linewidth=0.4)
    for layer, _, shade in _shades(outside, colour):
        cell = Rectangle((0, tops[layer]), max(1, len(blocks)), 1, facecolor=shade, edgecolor="white", linewidth=0.4)
        axes.add_patch(cell)
    return figure


def _shades(table: pd.DataFrame, colour: Callable[[float, object], Colour]) -> Iterator[tuple[str, int, Colour]]:
    """Layer, block and colour of each row."""
    levels = table["level"] if "level" in table else [None] * len(table)
    for layer, block, value, level in zip(table["layer"], table["block"], table["value"], levels, strict=True):
        yield str(layer), block, colour(float(value), level)


def _axes(tops: Mapping[str, float], blocks: Sequence[int]) -> tuple[Figure, Axes]:
    """An empty map: the top of each layer's row, and the blocks that have columns."""
    height = max(tops.values()) + 1
    figure = Figure(figsize=(_WIDTH, 0.6 + 0.2 * height))
    axes = figure.subplots()
    axes.set_xlim(0, max(1, len(blocks)))
    axes.set_ylim(height, 0)
    names = [layer.rsplit(".", 1)[-1] for layer in tops]
    short = names if len(set(names)) == len(names) else list(tops)
    axes.set_yticks([top + 0.5 for top in tops.values()], short)
    step = max(1, math.ceil(len(blocks) / _TICKS))
    axes.set_xticks(np.arange(0, len(blocks), step) + 0.5, [str(block) for block in blocks[::step]])
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes
