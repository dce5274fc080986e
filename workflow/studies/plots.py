"""Figures of the studies: repeated searches side by side, fitness by tokens, convergence, and summed errors."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from evopress.artifacts.paths import DENSE
from evopress.artifacts.tables import LLAMA_CPP
from evopress.util.figures import ACCENT, INK, STYLE, to_svg
from studies.convergence import fits

MOST_PANELS = 4
"""Quantities that the comparison's figure has room for."""


def comparison_figure(table: pd.DataFrame) -> str:
    """SVG of mean and spread of every perplexity and KL, by search.

    Args:
        table: columns of COMPARISON, with at least one search beside the dense model.
    """
    shown = table[table["quantity"].isin(("perplexity", "KL")) & (table["search"] != DENSE)]
    searches = list(dict.fromkeys(shown["search"]))
    panels = list(shown.groupby(["quantity", "of"], sort=False))[:MOST_PANELS]
    with rc_context({**STYLE, "svg.hashsalt": "comparison"}):
        figure = Figure(figsize=(9, 0.9 + 0.26 * len(searches)))
        for axes, (title, rows) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
        ):
            places = [searches.index(search) for search in rows["search"]]
            axes.errorbar(rows["mean"], places, xerr=rows["spread"].fillna(0), fmt="o", color=ACCENT, markersize=4)
            axes.set_xlabel(" ".join(map(str, title)))
            axes.set_yticks(range(len(searches)), searches)
            _grid(axes)
        axes.invert_yaxis()  # the axis is shared
        return to_svg(figure)


def progress_figure(traces: Mapping[str, Sequence[pd.DataFrame]], fitness: Mapping[str, str]) -> str:
    """SVG of the best fitness so far by tokens spent: a line a search, a colour a group, a panel a fitness function.

    Args:
        traces: columns of TRACE, of each search of each group; at least one has an accepted candidate.
        fitness: what each group's axis says.
    """
    panels = list(dict.fromkeys(fitness[group] for group in traces))
    colours = dict(zip(traces, colormaps["tab10"].colors * len(traces), strict=False))  # type: ignore[attr-defined]
    with rc_context({**STYLE, "svg.hashsalt": "progress"}):
        figure = Figure(figsize=(9, 3.4))
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for group in (group for group in traces if fitness[group] == panel):
                for number, trace in enumerate(traces[group]):
                    curve = best_so_far(trace)
                    label = group if number == 0 else None
                    axes.step(curve["tokens"] / 1e3, curve["best"], where="post", color=colours[group], label=label)
            axes.set_xlabel("tokens judged so far (thousands)")
            axes.set_ylabel(f"{panel}, best so far")
            axes.legend(frameon=False)
            _grid(axes)
        return to_svg(figure)


def best_so_far(trace: pd.DataFrame) -> pd.DataFrame:
    """Least fitness of the accepted candidates up to each generation, by the tokens judged until its end.

    Fitness is that of the last selection step, where the parent has part; starts that were compared on less text are
    passed over. Where the last step sees the whole search text, all values are on the same tokens; otherwise a lucky
    draw of tokens shows as progress.

    Args:
        trace: columns of TRACE.

    Returns:
        Columns generation, tokens, best: one row for each generation that accepted a candidate.
    """
    spent = trace.groupby("generation")["tokens"].sum().cumsum()
    accepted = trace[trace["accepted"]]
    text = accepted["sequences"].map(len)
    best = accepted[text == text.max()].groupby("generation")["fitness"].min().cummin()
    curve = best.rename("best").reset_index()
    curve["tokens"] = curve["generation"].map(spent)
    return curve[["generation", "tokens", "best"]]


def convergence_figure(table: pd.DataFrame) -> str:
    """SVG of generations to the optimum by k(n - k)/lambda, a panel for each kind of mutation, with the fitted slope.

    Args:
        table: columns of CONVERGENCE.
    """
    fitted = fits(table)
    with rc_context({**STYLE, "svg.hashsalt": "convergence"}):
        figure = Figure(figsize=(9, 3.6))
        panels = figure.subplots(1, len(fitted), sharey=True, squeeze=False)[0]
        for axes, fit in zip(panels, fitted.to_dict("records"), strict=True):
            rows = table[table["switches"] == fit["switches"]]
            for count, marker in zip(sorted(rows["offspring"].unique()), "os^Dv*" * len(rows), strict=False):
                some = rows[rows["offspring"] == count]
                axes.scatter(some["bound"], some["generations"], s=12, marker=marker, alpha=0.6, label=f"λ = {count}")
            ends = np.array([rows["bound"].min(), rows["bound"].max()])
            axes.plot(ends, fit["slope"] * ends, color=INK, linewidth=1, label=f"slope {fit['slope']:.2f}")
            for set_scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
                set_scale("log")
                axis.set_major_formatter("{x:g}")  # powers would be mathematical text, which figures do not parse
                axis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("k(n - k)/λ")
            axes.set_title(f"switches: {fit['switches']}")
            axes.legend(frameon=False)
            _grid(axes)
        panels[0].set_ylabel("generations to the optimum")
        return to_svg(figure)


def errors_figure(candidates: pd.DataFrame, pairs: pd.DataFrame, name: str, fitness: str) -> str:
    """SVG of fitness by summed error, with a line between the candidates of each confirmed pair.

    Args:
        candidates: columns of MONOTONICITY_CANDIDATES.
        pairs: columns of MONOTONICITY_PAIRS.
        name: of the study; makes the SVG's internal names unique.
        fitness: what the y axis says.
    """
    free = candidates[candidates["base"] < 0].set_index("candidate")
    with rc_context({**STYLE, "svg.hashsalt": f"monotonicity {name}"}):
        figure = Figure(figsize=(9, 3.8))
        axes = figure.subplots()
        axes.scatter(free["error"], free["fitness"], s=14, color=INK, alpha=0.6)
        for pair in pairs[pairs["confirmed"] & (pairs["claim"] == "errors")].to_dict("records"):
            ends = free.loc[[pair["favoured"], pair["other"]]]
            axes.plot(ends["error"], ends["fitness"], color=ACCENT, linewidth=1)
        axes.set_xlabel("sum of the errors of single units")
        axes.set_ylabel(f"{fitness}, lower is better")
        _grid(axes)
        return to_svg(figure)


def peers_figure(table: pd.DataFrame) -> str:
    """SVG of KL by size of the file, a panel for each text: llama.cpp's files, and searches at their sizes.

    Args:
        table: columns of PEERS.
    """
    panels = list(table.groupby("dataset", sort=False))[:MOST_PANELS]
    with rc_context({**STYLE, "svg.hashsalt": "peers"}):
        figure = Figure(figsize=(9, 3.8))
        for axes, (dataset, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for maker, own in rows.groupby("maker", sort=False):
                ours = maker != LLAMA_CPP
                ordered = own.sort_values("bytes")
                line, colour = ("-", ACCENT) if ours else ("", INK)
                axes.plot(
                    ordered["bytes"] / 1e6,
                    ordered["kl"],
                    line,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=str(maker),
                )
            for peer in rows[rows["maker"] == LLAMA_CPP].to_dict("records"):
                place = (peer["bytes"] / 1e6, peer["kl"])
                axes.annotate(str(peer["peer"]), place, (3, 3), textcoords="offset points", fontsize=6)
            axes.set_xlabel("size of the file, MB")
            axes.set_title(str(dataset))
            axes.legend(frameon=False)
            _grid(axes)
        figure.axes[0].set_ylabel("KL to the dense model, lower is better")
        return to_svg(figure)


def _grid(axes: Axes) -> None:
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
