"""The comparison of a run: what was measured of each search, grouped, as a table and as text."""

import json
from collections.abc import Mapping, Sequence

from evopress.artifacts.atomic import write_text
from evopress.artifacts.paths import Run, text_path
from evopress.artifacts.provenance import Provenance, read_model_fingerprint, require_same_model
from evopress.artifacts.study_tables import COMPARISON
from evopress.artifacts.tables import EFFORT, read_provenance, read_table, write_table
from evopress.report.comparison import Cell, Comparison, compare
from evopress.report.summary import tables
from evopress.studies.comparison import SECONDS, TOKENS, as_comparison, group_table

_NOTE = """\
Each row is a search of the settings: the mean over its seeds, ± their standard deviation where it has several.
* better than every other compressed model, by more than the standard deviations of both together"""


def compare_searches(run: Run, groups: Mapping[str, Sequence[str]]) -> None:
    """Write ``run.comparison`` and the same as text beside it.

    Args:
        run: a run whose searches are measured.
        groups: searches by the name that the settings give them.

    Raises:
        ArtifactError: an artifact is missing, damaged or of another model.
    """
    searches = [name for members in groups.values() for name in members]
    comparison = compare(run, searches)
    for search in searches:
        _put_effort(comparison, run, search)
    table = group_table(comparison, groups)
    provenance = Provenance("comparison", json.dumps({"groups": dict(groups)}), read_model_fingerprint(run))
    write_table(table, run.comparison, COMPARISON, provenance)
    text = "\n\n".join(tables(as_comparison(table)))
    write_text(text_path(run.comparison), f"{text}\n\n{_NOTE}\n")


def _put_effort(comparison: Comparison, run: Run, search: str) -> None:
    path = run.effort(search)
    effort = read_table(path, EFFORT)
    require_same_model(run, read_provenance(path), path)
    comparison.put(search, TOKENS, Cell(float(effort["tokens"].sum()) / 1000))
    comparison.put(search, SECONDS, Cell(float(effort["seconds"].sum())))
