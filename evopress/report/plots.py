"""Figures of the report as inline SVG that takes its ink from the page, so that light and dark both work."""

import io
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from evopress.models.modules import OUTER

INK = "#010203"
"""Stands for the page's text colour: no figure uses it otherwise, and it becomes `currentColor`."""
ACCENT = "#e07a2f"
FITNESS = {"kl": "KL (nats)", "topk_kl": "top-k KL (nats)", "perplexity": "log perplexity (nats)"}
"""What values of fitness in a trace are."""
SMOOTHING = 15
"""Generations in the window of the running median."""
MOST_TICKS = 9
"""Values that the scale of a level map names, at most."""
LABELLED_BLOCKS = 48
"""Up to so many blocks, each cell of a heat map can hold its label."""

STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def search_curve(trace: pd.DataFrame, name: str, fitness: str) -> str:
    """SVG of the parent's fitness by generation and by tokens spent.

    Args:
        trace: columns of TRACE, with at least one accepted candidate.
        name: of the search; makes the SVG's internal names unique.
        fitness: what the y axis says.
    """
    curve = parent_curve(trace)
    with rc_context({**STYLE, "svg.hashsalt": f"curve {name}"}):
        figure = Figure(figsize=(9, 2.8))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, x, label in (
            (left, curve["generation"], "generation"),
            (right, curve["tokens"] / 1e6, "tokens judged so far (millions)"),
        ):
            axes.plot(x, curve["fitness"], color=INK, alpha=0.45, linewidth=0.8, label="parent, on its own minibatch")
            axes.plot(x, curve["median"], color=ACCENT, linewidth=2, label=f"running median of {SMOOTHING}")
            axes.set_xlabel(label)
            axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        left.set_ylabel(f"{fitness}, lower is better")
        right.legend(frameon=False)
        return to_svg(figure)


def parent_curve(trace: pd.DataFrame) -> pd.DataFrame:
    """One row a generation: its fitness, the tokens spent up to its end, and the running median of the fitness.

    The fitness is that of the accepted candidate in the last step.
    """
    accepted = trace[trace["accepted"]].sort_values(["generation", "step"]).groupby("generation").tail(1)
    spent = trace.groupby("generation")["tokens"].sum().cumsum()
    curve = accepted[["generation", "fitness"]].reset_index(drop=True)
    curve["tokens"] = curve["generation"].map(spent)
    curve["median"] = curve["fitness"].rolling(SMOOTHING, center=True, min_periods=1).median()
    return curve


def level_map(configuration: pd.DataFrame, name: str, values: list[float]) -> str:
    """SVG heat map of levels, layers by blocks.

    Args:
        configuration: columns of CONFIGURATION.
        name: of the search; makes the SVG's internal names unique.
        values: all values of levels in the run, so that the maps of several searches share their colours.
    """
    configuration = configuration[~configuration["layer"].isin(OUTER)]
    order = list(dict.fromkeys(configuration["layer"]))
    grid = configuration.pivot(index="layer", columns="block", values="value").loc[order]
    labels = configuration.pivot(index="layer", columns="block", values="level").loc[order]
    edges = _edges(sorted(set(values)))
    colours = colormaps["viridis"].resampled(len(edges) - 1)
    with rc_context({**STYLE, "svg.hashsalt": f"levels {name}"}):
        figure = Figure(figsize=(9, 0.9 + 0.28 * len(order)))
        axes = figure.subplots()
        norm = BoundaryNorm(edges, colours.N)
        image = axes.pcolormesh(grid, cmap=colours, norm=norm, edgecolors="none", linewidth=0)
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(order)) + 0.5, order)
        step = max(1, math.ceil(grid.shape[1] / 24))
        axes.set_xticks(np.arange(0, grid.shape[1], step) + 0.5, grid.columns[::step].astype(str))
        axes.set_xlabel("block")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if grid.shape[1] <= LABELLED_BLOCKS:
            _label_cells(axes, labels, grid, lambda value: colours(norm(value)))
        ticks = sorted(set(values))
        ticks = ticks[:: math.ceil(len(ticks) / MOST_TICKS)]
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, ticks=ticks)
        bar.ax.tick_params(length=0)
        bar.ax.set_yticklabels([f"{value:.3g}" for value in ticks])
        bar.outline.set_visible(False)
        return to_svg(figure)


def outer_levels(configuration: pd.DataFrame) -> str:
    """A sentence on the levels of input embedding and head, which are in no block; empty where they have none."""
    rows = configuration[configuration["layer"].isin(OUTER)]
    told = ", ".join(f"{layer} {level}" for layer, level in zip(rows["layer"], rows["level"], strict=True))
    return f" Outside of the blocks: {told}." if told else ""


def to_svg(figure: Figure) -> str:
    """SVG element without XML header, its ink replaced by the page's colour; the same bytes each time."""
    stream = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"| height="[\d.]+pt" width="[\d.]+pt"', "", text, count=1)


def _label_cells(axes: Any, labels: pd.DataFrame, grid: pd.DataFrame, colour: Any) -> None:
    """Write each level into its cell, dark on light and light on dark."""
    values = grid.to_numpy()
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            if math.isnan(values[row, column]):
                continue
            red, green, blue, _ = colour(values[row, column])
            ink = "#111111" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
            position = (column + 0.5, row + 0.5)
            axes.text(*position, str(labels.iat[row, column]), ha="center", va="center", color=ink, fontsize=7)


def _edges(values: list[float]) -> list[float]:
    """Boundaries between neighbouring values, and one beyond either end."""
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    return [values[0] - 0.5, *middles, values[-1] + 0.5]
