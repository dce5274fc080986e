"""Searches that only differ in their seed compared as one: mean and spread of everything that was measured."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from evopress.artifacts.atomic import write_text
from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.tables import EFFORT, read_provenance, read_table, write_table
from evopress.config.context import StageContext
from evopress.report.comparison import Cell, Column, Comparison, compare, tables
from studies.paths import comparison_path, text_path
from studies.settings import ReportedStudies
from studies.tables import COMPARISON

TOKENS = Column("tokens", "judged, thousands", 0, "")
SECONDS = Column("time", "s", 0, "")
_NOTE = """\
Each row is a search of the settings: the mean over its seeds, ± their standard deviation where it has several.
* better than every other compressed model, by more than the standard deviations of both together"""


def compare_searches(context: StageContext, settings: ReportedStudies, on_tasks: Sequence[str] = ()) -> None:
    """Write the table of the comparison, and the same as text beside it.

    Args:
        context: of a run whose searches are measured.
        settings: its `groups` are searches by the name that the settings give them.
        on_tasks: models that have answered lm-eval's tasks, the dense one among them; none where no task is named.

    Raises:
        ArtifactError: an artifact is missing, damaged or of another model.
    """
    run, groups = context.run, settings.groups
    searches = [name for members in groups.values() for name in members]
    comparison = compare(run, searches, on_tasks=on_tasks)
    for search in searches:
        _put_effort(comparison, run, search)
    table, path = group_table(comparison, groups), comparison_path(run)
    provenance = Provenance("comparison", json.dumps({"groups": dict(groups)}), read_model_fingerprint(run))
    write_table(table, path, COMPARISON, provenance)
    text = "\n\n".join(tables(as_comparison(table)))
    write_text(text_path(path), f"{text}\n\n{_NOTE}\n")


def _put_effort(comparison: Comparison, run: Run, search: str) -> None:
    path = run.effort(search)
    effort = read_table(path, EFFORT)
    require_same_model(run, read_provenance(path), path)
    comparison.put(search, TOKENS, Cell(float(effort["tokens"].sum()) / 1000))
    comparison.put(search, SECONDS, Cell(float(effort["seconds"].sum())))


def group_table(comparison: Comparison, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Mean and sample standard deviation of each column over the searches of each group.

    Args:
        comparison: one row a search.
        groups: names of the searches of each group; models of the comparison that no group names stay alone.

    Returns:
        Columns of COMPARISON; a search in which a quantity was not measured does not count for it.
    """
    grouped = {name for searches in groups.values() for name in searches}
    alone = {model: [model] for model in comparison.rows if model not in grouped}
    rows = []
    for group, searches in {**alone, **groups}.items():
        for column in comparison.columns:
            values = [comparison.rows[name][column].value for name in searches if column in comparison.rows[name]]
            if values:
                about = (group, column.title, column.subtitle, column.better, column.digits)
                rows.append((*about, *mean_and_spread(values), len(values)))
    return pd.DataFrame(rows, columns=COMPARISON.names)


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is NaN of a single value."""
    array = np.array(list(values), dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def as_comparison(table: pd.DataFrame) -> Comparison:
    """Rows of COMPARISON as a comparison whose cells have the spread for their error."""
    comparison = Comparison()
    for row in table.to_dict("records"):
        column = Column(row["quantity"], row["of"], int(row["digits"]), row["better"])
        comparison.put(row["search"], column, Cell(row["mean"], row["spread"]))
    return comparison
