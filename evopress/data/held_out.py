"""Whether held-out text is held out, by what the tables of tokens record of their texts."""

import json
from collections.abc import Iterable

from pydantic import TypeAdapter, ValidationError

from evopress.artifacts.paths import Run
from evopress.artifacts.tables import read_provenance
from evopress.config.data import TextSettings, held_out_problems


def recorded_leaks(run: Run, datasets: Iterable[str]) -> list[str]:
    """One sentence for each of the evaluation sets whose text has also calibrated or guided the search.

    Raises:
        ArtifactError: a table is damaged.
    """
    used, held_out = (
        {name: text for name in names if (text := _recorded(run, name)) is not None}
        for names in (("calibration", "search"), datasets)
    )
    return held_out_problems(used, held_out)


def _recorded(run: Run, dataset: str) -> TextSettings | None:
    """Settings of a text; None where its tokens are not there (nothing used them) or record no settings of today."""
    path = run.tokens(dataset)
    if not path.exists():
        return None
    try:
        return _TEXT.validate_python(json.loads(read_provenance(path).settings))
    except ValidationError:
        return None


_TEXT: TypeAdapter[TextSettings] = TypeAdapter(TextSettings)
