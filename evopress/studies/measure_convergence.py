"""The study of convergence, from settings to its table."""

from evopress.artifacts.atomic import write_text
from evopress.artifacts.paths import Run, text_path
from evopress.artifacts.provenance import Provenance
from evopress.artifacts.study_tables import CONVERGENCE
from evopress.artifacts.tables import write_table
from evopress.config.studies import ConvergenceSettings
from evopress.plan.text import columns
from evopress.studies.convergence import cases, convergence_table
from evopress.studies.words import convergence_rows
from evopress.util.progress import progress

NO_MODEL = ""
"""Fingerprint in the provenance of what was made without a model."""


def measure_convergence(run: Run, settings: ConvergenceSettings) -> None:
    """Write ``run.convergence`` and its fits as text beside it.

    Raises:
        ArtifactError: they cannot be written.
    """
    runs = list(cases(settings.units, settings.kept, settings.offspring, settings.switches, settings.runs))
    with progress("convergence", len(runs), "runs") as bar:
        table = convergence_table(runs, bar.advance)
    write_table(table, run.convergence, CONVERGENCE, Provenance("convergence", settings.model_dump_json(), NO_MODEL))
    text = columns(convergence_rows(table))
    title = "Generations to the optimum of linear objectives, against k(n - k)/lambda"
    write_text(text_path(run.convergence), f"{title}\n\n{text}\n")
