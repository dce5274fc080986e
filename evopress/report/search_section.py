"""What the report says of one search, and its curves."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evopress.artifacts.exports import recorded_polish
from evopress.artifacts.paths import HUGGINGFACE, Run
from evopress.artifacts.tables import CONFIGURATION, EFFORT, PROGRESS, TRACE, read_table, settings_of
from evopress.compression.base import Family
from evopress.compression.families import family_of, of_modules
from evopress.search.evaluation import read_effort
from evopress.search.target import target_text
from evopress.util.figures import ACCENT, INK, STYLE, to_svg

MOVES = ["kind of layer", "raised", "lowered"]
FITNESS = {"kl": "KL (nats)", "topk_kl": "top-k KL (nats)", "perplexity": "log perplexity (nats)"}
"""What values of fitness in a trace are."""
TOKENS = "tokens judged so far (millions)"
SMOOTHING = 15
"""Rounds in the window of the running median."""


@dataclass(frozen=True)
class SearchSection:
    """One search: what was asked for, what was reached, and the way there."""

    name: str
    strategy: str
    budget: str
    """What was asked for, and what was reached."""
    curves: dict[str, Markup]
    """By what the x axis says; none where no candidate was judged."""
    told: str
    """What the curves show, in sentences."""
    moves: list[list[str]]
    """How often each kind of layer was raised and lowered by what was accepted, MOVES first; or nothing."""
    polish: str
    """How the chosen levels were made once more; empty where they were not."""
    exports: str
    """Forms in which its model is written."""


def search_section(run: Run, search: str, exporters: Sequence[str]) -> SearchSection:
    """Read what a search left.

    Raises:
        ArtifactError: an artifact is missing or damaged.
    """
    settings = settings_of(run.configuration(search))
    configuration = read_table(run.configuration(search), CONFIGURATION)
    progress, trace = read_table(run.progress(search), PROGRESS), read_table(run.trace(search), TRACE)
    fitness = str(settings.get("fitness", "fitness"))
    axis, curves, told = FITNESS.get(fitness, fitness), dict[str, str](), ""
    if len(progress):
        curves, told = progress_curves(progress, search, axis), _progress_told(progress, trace)
    elif trace["accepted"].any():
        curves, told = search_curves(trace, search, axis), _trace_told(trace)
    return SearchSection(
        name=search,
        strategy=str(settings.get("strategy", "unknown")),
        budget=_budget(settings.get("target"), configuration, family_of(configuration)),
        curves={label: Markup(svg) for label, svg in curves.items()},  # noqa: S704 (matplotlib escapes)
        told=told,
        moves=moves(progress),
        polish=_polish(run, search),
        exports=", ".join(exporters),
    )


def moves(progress: pd.DataFrame) -> list[list[str]]:
    """Accepted moves by kind of layer, MOVES first; nothing where none was accepted.

    Args:
        progress: columns of PROGRESS.
    """
    up, down = (
        Counter(unit.rsplit(".", 1)[-1] for units in progress[way] for unit in units) for way in ("raised", "lowered")
    )
    kinds = sorted(up | down, key=lambda kind: (-up[kind] - down[kind], kind))
    return [MOVES, *([kind, str(up[kind]), str(down[kind])] for kind in kinds)] if kinds else []


def _progress_told(progress: pd.DataFrame, trace: pd.DataFrame) -> str:
    best = progress[progress["candidate"] == "best"]
    generations, part = int(best["generation"].max()), int(best["part"].iloc[0])
    better = int((best["raised"].map(len) + best["lowered"].map(len) > 0).sum())
    offspring = trace[(trace["generation"] > 0) & (trace["candidate"] >= 0)]
    made = offspring.drop_duplicates(["generation", "candidate"])
    judged = (progress["fitness"].notna() & ~progress.duplicated(["candidate", "fitness"])).sum() * part
    share = judged / max(1, int(best["tokens"].max()))
    return (
        f"The best so far on one fixed part of the search text ({part:,} tokens), judged once the search was over, for "
        f"{share:.1%} more tokens; it had no say in what was found. The part is of the text that the search draws "
        f"from, so it is not held out. A better candidate was found in {better} of {generations} generations, among "
        f"{len(made):,} offspring."
    )


def _trace_told(trace: pd.DataFrame) -> str:
    return (
        f"Fitness of what was accepted over {int(trace['generation'].max())} rounds, and over the tokens that all "
        "candidates were judged on. Each round may judge on tokens of its own, so single points scatter; the running "
        "median shows the trend."
    )


def _polish(run: Run, search: str) -> str:
    """How the model that is evaluated was polished, and how long that took."""
    polish = recorded_polish(run, search, HUGGINGFACE)
    if polish == "none":
        return ""
    effort = read_effort(read_table(run.polish_effort(search), EFFORT))
    return f"polished ({polish}, {effort.seconds:.0f} s)"


def _budget(target: object, configuration: pd.DataFrame, family: Family) -> str:
    asked = target_text(target)
    rows = configuration[of_modules(configuration) == family.takes_modules]
    if isinstance(target, Mapping):
        return f"a file of {asked} {family.reached(rows)} in {family.asked}"
    return f"{asked} {family.asked} {family.reached(rows)}"


def progress_curves(progress: pd.DataFrame, name: str, fitness: str) -> dict[str, str]:
    """SVGs of the best so far on the fixed part of the text, by x axis: tokens judged, and seconds.

    Args:
        progress: columns of PROGRESS, with at least one row of the best.
        name: of the search; makes the SVGs' internal names unique.
        fitness: what the y axis says.
    """
    best = progress[(progress["candidate"] == "best") & progress["fitness"].notna()]
    uniform = progress[progress["candidate"] == "uniform"]["fitness"]

    def draw(axes: Axes, x: "pd.Series[float]") -> None:
        """Draw the best so far, its start, and the uniform choices."""
        for value in uniform:
            axes.axhline(value, color=INK, alpha=0.8, linewidth=1, linestyle="--", label="uniform choice")
        axes.axhline(best["fitness"].iloc[0], color=INK, alpha=0.6, linewidth=1, linestyle=":", label="start")
        axes.step(x, best["fitness"], where="post", color=ACCENT, linewidth=2, label="best so far")
        axes.plot(x, best["fitness"], "o", color=ACCENT, markersize=3)
        axes.set_xlim(left=0)

    x = {TOKENS: best["tokens"] / 1e6, "seconds": best["seconds"]}
    return _panels(draw, x, f"progress {name}", fitness)


def search_curves(trace: pd.DataFrame, name: str, fitness: str) -> dict[str, str]:
    """SVGs of what each round accepted, on its own tokens, by x axis: rounds, and tokens judged.

    For searches that have no progress: their rounds lead to the budget, or go through a list.

    Args:
        trace: columns of TRACE, with at least one accepted candidate.
        name: of the search; makes the SVGs' internal names unique.
        fitness: what the y axis says.
    """
    curve = parent_curve(trace)

    def draw(axes: Axes, x: "pd.Series[float]") -> None:
        """Draw what was accepted, and its running median."""
        axes.plot(x, curve["fitness"], color=INK, alpha=0.45, linewidth=0.8, label="accepted, on its own tokens")
        axes.plot(x, curve["median"], color=ACCENT, linewidth=2, label=f"running median of {SMOOTHING}")

    return _panels(draw, {"round": curve["generation"], TOKENS: curve["tokens"] / 1e6}, f"curve {name}", fitness)


def _panels(
    draw: Callable[[Axes, "pd.Series[float]"], None], x: Mapping[str, "pd.Series[float]"], name: str, fitness: str
) -> dict[str, str]:
    """An SVG for each x axis, by what it says."""
    drawn = {}
    for label, values in x.items():
        with rc_context({**STYLE, "svg.hashsalt": f"{name} {label}"}):
            figure = Figure(figsize=(5.6, 2.9))
            axes = figure.subplots()
            draw(axes, values)
            axes.set_xlabel(label)
            axes.set_ylabel(f"{fitness}, lower is better")
            axes.grid(color=INK, alpha=0.12, linewidth=0.6)
            axes.legend(frameon=False)
            drawn[label] = to_svg(figure)
    return drawn


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
