"""Fronts: size against quality of all sizes that one search stands for, as a figure and a table, with the knee marked.

The knee is where a larger file begins to bring less: on the curve of log KL over the sizes that were asked for, both
scaled to run from 0 to 1 between the ends, it is the point farthest below the straight line that joins them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import EFFORT, LLAMA_CPP, PEERS, TRACE, read_provenance, read_table, settings_of
from evopress.report.comparison import FILE, SIZE, Cell, Column, Comparison, measured_column
from evopress.report.maps import effects_of
from evopress.report.search_section import FITNESS
from evopress.report.sections import ReportSection, environment
from evopress.search.target import size_name
from evopress.util.figures import ACCENT, INK, STYLE, to_svg
from evopress.util.text import columns

TEMPLATE = Path(__file__).with_suffix(".html.j2")
MOST_PANELS = 4
"""Quantities that the figure has room for."""
KNEE, WORSE, SAME = "knee", "worse than a smaller file", "no more bytes were of use"


@dataclass(frozen=True)
class Point:
    """One size: a search, or several that differ in their seed."""

    name: str
    searches: tuple[str, ...]
    """None of a file that no search has made."""
    megabytes: float
    """Size of the file, or packed size of the model where no export has one."""
    cells: Mapping[Column, Cell]
    """Perplexity and KL on each text: the mean over seeds, with their standard deviation."""
    fitness: float
    """Of what was found, on the tokens that are the same for all sizes."""
    asked: float = math.nan
    """Megabytes that the search was for: the file is smaller where no more of them make it better."""


@dataclass(frozen=True)
class Curve:
    """A front."""

    name: str
    points: tuple[Point, ...]
    """By size, ascending."""
    others: tuple[Point, ...]
    """What other searches of the run have found, and files of llama.cpp's quantizer."""
    fitness: str
    """What fitness is."""
    shared: int
    """Tokens judged for single effects, which all sizes share."""
    own: int
    """Tokens judged for all sizes beside them."""

    @property
    def knee(self) -> Point | None:
        """Where the curve bends most; None where it does not."""
        found = knee([point.asked for point in self.points], [_log_kl(point) for point in self.points])
        return None if found is None else self.points[found]

    @property
    def worse(self) -> list[Point]:
        """Points that are worse than one of a smaller file, on the same part of the search text."""
        fitness = [point.fitness for point in self.points]
        return [point for number, point in enumerate(self.points) if fitness[number] > min(fitness[: number + 1])]

    def cost(self) -> str:
        """What it took, beside one search for a single size."""
        searches = sum(len(point.searches) for point in self.points)
        one = self.shared + self.own / searches
        return (
            f"{self.shared + self.own:,} tokens judged, {self.shared:,} of them for the effects of single layers, "
            f"which all {searches} searches share: {(self.shared + self.own) / one:.1f} times what one search for one "
            "size takes."
        )


def read_fronts(
    run: Run, names: Sequence[str], searches: Sequence[str], comparison: Comparison, peers: Path | None = None
) -> list[Curve]:
    """Fronts of a run.

    Args:
        run: the run.
        names: of the fronts, as the settings file has them.
        searches: all that are compared.
        comparison: what was measured of them.
        peers: table of llama.cpp's own files, where there is one (columns of PEERS).

    Raises:
        ArtifactError: an artifact is missing, damaged or of another model.
    """
    made = [] if peers is None or not names else list(_peer_points(run, peers))
    settings = {search: settings_of(run.configuration(search)) for search in searches}
    found = []
    for name in names:
        members = {search: _point_name(name, search, settings[search]) for search in searches}
        sized = dict.fromkeys(point for point in members.values() if point)
        together = {point: [search for search in searches if members[search] == point] for point in sized}
        points = [
            replace(_point(run, point, own, comparison), asked=settings[own[0]]["target"]["bytes"] / 1e6)
            for point, own in together.items()
        ]
        inside = [search for own in together.values() for search in own]
        others = [_point(run, search, [search], comparison) for search in searches if search not in inside]
        effects = {effects_of(settings[search]) for search in inside} - {None}
        found.append(
            Curve(
                name=name,
                points=tuple(sorted(points, key=lambda point: point.asked)),
                others=(*others, *made),
                fitness=FITNESS[settings[inside[0]]["fitness"]],
                shared=sum(int(read_table(run.effects_effort(str(one)), EFFORT)["tokens"][0]) for one in effects),
                own=sum(int(read_table(run.trace(search), TRACE)["tokens"].sum()) for search in inside),
            )
        )
    return found


def _peer_points(run: Run, path: Path) -> Iterator[Point]:
    """Files of llama.cpp's quantizer; beside them, the table has searches at their sizes."""
    require_same_model(run, read_provenance(path), path)
    table = read_table(path, PEERS)
    for peer, rows in table[table["maker"] == LLAMA_CPP].groupby("peer", sort=False):
        cells = {
            measured_column(quantity, text): Cell(value)
            for quantity in ("perplexity", "kl")
            for text, value in zip(rows["dataset"], rows[quantity], strict=True)
        }
        yield Point(str(peer), (), rows["bytes"].iloc[0] / 1e6, cells, math.nan)


def _point_name(front: str, search: str, settings: Mapping[str, object]) -> str | None:
    """Name of the size that a search of a front has, without a seed; None of another search."""
    target = settings.get("target")
    size = target.get("bytes") if isinstance(target, Mapping) else None
    name = f"{front}-{size_name(size)}" if size else None
    return name if search in (name, f"{name}-seed{settings.get('seed')}") else None


def _point(run: Run, name: str, searches: Sequence[str], comparison: Comparison) -> Point:
    rows = [comparison.rows[search] for search in searches]
    measured = [column for column in comparison.columns if column.title in ("KL", "perplexity")]
    last = [read_table(run.trace(search), TRACE)["fitness"].to_numpy()[-1:] for search in searches]
    return Point(
        name=name,
        searches=tuple(searches),
        megabytes=fmean(row.get(FILE, row[SIZE]).value for row in rows),
        cells={column: _mean([row[column].value for row in rows]) for column in measured},
        fitness=float(np.mean(last)) if all(map(len, last)) else math.nan,
    )


def _mean(values: Sequence[float]) -> Cell:
    return Cell(fmean(values), stdev(values) if len(values) > 1 else math.nan)


def _log_kl(point: Point) -> float:
    """Logarithm of the KL, mean over the texts; NaN where there is none."""
    found = [cell.value for column, cell in point.cells.items() if column.title == "KL"]
    return fmean(map(math.log, found)) if found and min(found) > 0 else math.nan


def knee(sizes: Sequence[float], heights: Sequence[float]) -> int | None:
    """Number of the point farthest below the chord between the first and the last, scaled to 1 on both axes.

    Args:
        sizes: ascending.
        heights: one for each.

    Returns:
        None where no point lies below the chord, there are fewer than three, or the curve does not fall.
    """
    x, y = np.array(sizes), np.array(heights)
    if len(x) < 3 or not np.isfinite(y).all() or y[-1] >= y[0]:
        return None
    below = 1 - (x - x[0]) / (x[-1] - x[0]) - (y - y[-1]) / (y[0] - y[-1])
    return int(below.argmax()) if below.max() > 1e-9 else None


def front_rows(curve: Curve) -> list[list[str]]:
    """The front as a table of texts, the first row its head."""
    measured = list(curve.points[0].cells)
    rows = [
        ["size", "MB", *(f"{column.title} {column.subtitle}" for column in measured), f"search {curve.fitness}", ""]
    ]
    for point in curve.points:
        cells = [point.cells[column].text(column.digits) for column in measured]
        rows.append([point.name, f"{point.megabytes:.1f}", *cells, f"{point.fitness:.4f}", _note(curve, point)])
    return rows


def _note(curve: Curve, point: Point) -> str:
    """What is to be said of a point."""
    number = curve.points.index(point)
    smaller = curve.points[number - 1] if number else None
    no_larger = smaller is not None and smaller.megabytes == point.megabytes
    return ", ".join([KNEE] * (point == curve.knee) + [WORSE] * (point in curve.worse) + [SAME] * no_larger)


def front_text(curve: Curve) -> str:
    """The front for the terminal."""
    return f"Front {curve.name}: {curve.cost()}\n\n{columns(front_rows(curve))}"


def front_sections(curves: Sequence[Curve]) -> Iterator[ReportSection]:
    """A section of the report for each front."""
    page = environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    for curve in curves:
        measured = list(curve.points[0].cells)
        svg = Markup(front_figure(curve.name, curve.points, curve.others, measured, curve.knee))  # noqa: S704 (matplotlib escapes)
        html = page.render(curve=curve, svg=svg, rows=front_rows(curve))
        yield ReportSection(f"Front {curve.name}", Markup(html))  # noqa: S704 (the template escapes)


def front_figure(
    name: str,
    points: Sequence[Point],
    others: Sequence[Point],
    measured: Sequence[Column],
    knee: Point | None,
) -> str:
    """SVG of the points of a front, joined by a line, and of other models beside it.

    Args:
        name: of the front; makes the SVG's internal names unique.
        points: by size.
        others: not of the front.
        measured: a panel for each.
        knee: gets a ring.
    """
    panels = sorted(measured, key=lambda column: column.title != "KL")[:MOST_PANELS]
    with rc_context({**STYLE, "svg.hashsalt": f"front {name}"}):
        figure = Figure(figsize=(9, 3.6))
        for axes, column in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            sizes, cells = [point.megabytes for point in points], [point.cells[column] for point in points]
            heights = [cell.value for cell in cells]
            spread = [0.0 if math.isnan(cell.stderr) else cell.stderr for cell in cells]
            axes.errorbar(sizes, heights, yerr=spread, color=ACCENT, linewidth=1.5, zorder=2)
            axes.scatter(sizes, heights, s=18, color=ACCENT, zorder=3)
            axes.scatter(
                [point.megabytes for point in others], [point.cells[column].value for point in others], s=18, color=INK
            )
            if knee is not None:
                place = (knee.megabytes, knee.cells[column].value)
                axes.scatter(*place, s=110, facecolors="none", edgecolors=INK, linewidths=1, zorder=4)
            _name_points(axes, points, column, name)
            _name_points(axes, others, column, "")
            if column.title == "KL" and min(heights) > 0:  # as the knee is found
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("size of the file, MB")
            axes.set_title(f"{column.title} {column.subtitle}")
            axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        return to_svg(figure)


def _name_points(axes: Any, points: Sequence[Point], column: Column, front: str) -> None:
    """Write each point's name beside it, without that of its front, as a link to the level map of its first search."""
    for point in points:
        place = (point.megabytes, point.cells[column].value)
        label = point.name.removeprefix(f"{front}-")
        text = axes.annotate(label, place, (4, 4), textcoords="offset points", fontsize=6.5, color=INK)
        if point.searches:
            text.set_url(f"#levels-{point.searches[0]}")
