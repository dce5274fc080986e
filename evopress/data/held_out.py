"""Whether held-out text is held out: by the settings, or by what the tables of tokens record of their texts."""

import filecmp
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from evopress.artifacts.paths import Run
from evopress.config.data import C4, DataSettings, FileText, FineWebEdu, HubText, Role, TextSettings, WikiText2
from evopress.data.documents import find_files
from evopress.util.errors import DataError

_TEXT: TypeAdapter[TextSettings] = TypeAdapter(TextSettings)


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
    from evopress.artifacts.tables import read_provenance  # pandas: not for the workflow, which asks the settings

    path = run.tokens(dataset)
    if not path.exists():
        return None
    try:
        return _TEXT.validate_python(json.loads(read_provenance(path).settings))
    except ValidationError:
        return None


def leaks(data: DataSettings) -> list[str]:
    """One sentence for each evaluation set whose text also calibrates or guides the search.

    Text is the same where files are (also a folder or pattern that holds them, or copies under other names), or splits
    of the hub. Files that are not there count by their path alone.
    """
    return held_out_problems({"calibration": data.calibration, "search": data.search}, data.evaluation)


def held_out_problems(used: Mapping[str, TextSettings], held_out: Mapping[str, TextSettings]) -> list[str]:
    """The same of texts by their role (calibration, search) and by the name of their evaluation set."""
    found = []
    for name, text in held_out.items():
        for role in ("calibration", "search"):
            if (other := used.get(role)) is not None and (shared := _shared(text, other, role)):
                found.append(
                    f"data.evaluation.{name} reads the same text as data.{role} ({shared}): its result is not held out"
                )
    return found


def _shared(held_out: TextSettings, used: TextSettings, role: Role) -> str:
    """What two texts share; empty where nothing."""
    if isinstance(held_out, FileText) and isinstance(used, FileText):
        return _shared_files(_files(held_out.path), _files(used.path))
    one, other = _hub_split(held_out, "evaluation"), _hub_split(used, role)
    if one and other and one[:2] == other[:2] and _overlap(one[2], other[2]):
        return " ".join(part for part in (*one[:2], one[2]) if part)
    return ""


def _files(path: str) -> list[Path]:
    try:
        return find_files(path)
    except DataError:  # not there (any more)
        return [Path(path)]


def _shared_files(files: list[Path], others: list[Path]) -> str:
    """The first of ``files`` that is among the others, or has the same content as one of them."""
    places = {os.path.realpath(other) for other in others}
    by_size: dict[int, list[Path]] = {}
    for other in others:
        if size := _size(other):
            by_size.setdefault(size, []).append(other)
    for file in files:
        if os.path.realpath(file) in places:
            return str(file)
        for other in by_size.get(_size(file), []):
            with suppress(OSError):
                if filecmp.cmp(file, other, shallow=False):
                    return f"{file} is a copy of {other}"
    return ""


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _hub_split(text: TextSettings, role: Role) -> tuple[str, str | None, str] | None:
    """Data set, configuration and split of a text of the hub; a role's share of a split is written as a slice of it."""
    match text:
        case HubText():
            return text.id.lower(), None if text.name == "default" else text.name, text.split
        case WikiText2():
            return "salesforce/wikitext", "wikitext-2-raw-v1", "test" if role == "evaluation" else "train"
        case C4():
            return "allenai/c4", "en", "validation" if role == "evaluation" else "train"
        case FineWebEdu():
            return "huggingfacefw/fineweb-edu", "sample-10BT", f"train[{role}]"
    return None


def _overlap(split: str, other: str) -> bool:
    """Whether splits as `datasets` writes them (`train`, `train[:10%]+test`) share a part: a slice of one is in all."""
    parts, others = ({part.strip() for part in text.split("+")} for text in (split, other))
    whole, whole_other = ({part for part in each if "[" not in part} for each in (parts, others))
    return bool(
        parts & others
        or "all" in whole | whole_other
        or whole & {part.split("[")[0] for part in others}
        or whole_other & {part.split("[")[0] for part in parts}
    )
