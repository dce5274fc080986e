"""The configuration that a search chose, read with the check that it belongs to the model at hand."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from evopress.artifacts.paths import Run
from evopress.artifacts.provenance import require_same_model
from evopress.artifacts.tables import CONFIGURATION, read_provenance, read_table
from evopress.compression.families import family_of
from evopress.util.errors import ArtifactError


def read_configuration(run: Run, search: str) -> pd.DataFrame:
    """Configuration of a search, with the columns of CONFIGURATION.

    Raises:
        ArtifactError: missing, damaged, empty, or made for another model.
    """
    path = run.configuration(search)
    configuration = read_table(path, CONFIGURATION)
    require_same_model(run, read_provenance(path), path)
    if configuration.empty:
        raise ArtifactError(f"{path}: holds no unit; delete it and run the search again")
    return configuration


def variants_of(run: Run, configuration: pd.DataFrame) -> Iterator[tuple[str, Path]]:
    """Name of each folder of variants that a configuration picks from, and a table there that records its settings."""
    for name, rows in configuration.groupby("variants"):
        if family_of(rows).takes_modules:
            yield str(name), run.module_table(str(name))
        else:
            yield str(name), run.variant_table(str(name), int(rows["block"].min()))
