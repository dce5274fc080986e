"""A configuration from a text file, which the rest of the run then treats as any other search's."""

from pathlib import Path

from evopress.artifacts.tables import LAYERS, read_table
from evopress.search.context import Context
from evopress.search.settings import ImportedSettings
from evopress.search.space import Candidate
from evopress.search.text_format import read_text
from evopress.search.text_match import match, require_budget


def imported(context: Context[ImportedSettings]) -> Candidate:
    """Read the file, and check it against the variants, the model and the target.

    Raises:
        ConfigError: it does not fit them, or is no text configuration.
        ArtifactError: the table of layers is missing or damaged.
    """
    settings = context.settings
    where = f"{context.where}.file: {settings.file}"
    blocks = int(read_table(context.run.layers, LAYERS)["block"].max()) + 1
    text = read_text(Path(settings.file), f"{context.where}.file")
    candidate = match(text, context.space, blocks, where)
    require_budget(context.space, candidate, settings.target, where)
    return candidate
