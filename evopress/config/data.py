"""Which text calibrates, guides the search and evaluates."""

import filecmp
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evopress.config.base import Name, Section, UserPath
from evopress.data.local import find_files
from evopress.util.errors import DataError

Role = Literal["calibration", "search", "evaluation"]
"""What a text is used for; the named sources give each role text of its own."""
StartToken = Literal["document", "window", "none"]
"""Where start tokens stand: before every document, before every document and every window, or nowhere."""


class _Text(Section):
    tokens: int | None = Field(
        None, ge=1, description="Number of tokens, a multiple of sequence_length; null takes all the text."
    )
    sequence_length: int = Field(2048, ge=2, description="Tokens per sequence.")
    seed: int = Field(0, ge=0, description="Seed of the choice and order of text; evaluation keeps the text's order.")
    bos: StartToken | None = Field(
        None,
        description="Start token before each `document`, also before each `window`, or `none`; null is window for "
        "Gemma and wherever the tokenizer adds it to a text, else none.",
    )

    @model_validator(mode="after")
    def _check_whole_sequences(self) -> "_Text":
        if self.tokens is not None and self.tokens % self.sequence_length:
            below = self.tokens // self.sequence_length * self.sequence_length
            near = " or ".join(str(n) for n in (below, below + self.sequence_length) if n)
            raise ValueError(
                f"tokens: {self.tokens} is not a multiple of sequence_length ({self.sequence_length}): use {near}"
            )
        return self


class PythonDocs(_Text):
    """The help topics that ship with CPython, split by topic so that no topic serves two roles."""

    source: Literal["python_docs"] = "python_docs"


class FineWebEdu(_Text):
    """FineWeb-Edu sample-10BT; long documents are split, not cut, and each document serves one role only."""

    source: Literal["fineweb_edu"] = "fineweb_edu"

    @model_validator(mode="after")
    def _check_bounded(self) -> "FineWebEdu":
        if self.tokens is None:
            raise ValueError("tokens: fineweb_edu has 10 billion tokens: say how many to take")
        return self


class WikiText2(_Text):
    """wikitext-2-raw-v1, joined by blank lines and cut into windows: test to evaluate, train for the other roles."""

    source: Literal["wikitext2"] = "wikitext2"


class C4(_Text):
    """C4 (en): 1,100 documents of validation to evaluate (null: 256 windows of them), train for the other roles."""

    source: Literal["c4"] = "c4"


_COLUMN = "Key or column that holds the text; null is `text`, or `messages` with `messages: true`."
_MESSAGES = (
    "Rows hold conversations, lists of messages with `role` and `content`, which the model's chat template puts into "
    "words."
)


class HubText(_Text):
    """Any data set of the Hugging Face hub, one document a row."""

    source: Literal["hub"] = "hub"
    id: str = Field(min_length=1, description="Data set, as in `allenai/c4`.")
    name: str | None = Field(None, description="Configuration of the data set.")
    split: str = Field("train", min_length=1, description="Split of the data set.")
    column: str | None = Field(None, min_length=1, description=_COLUMN)
    messages: bool = Field(False, description=_MESSAGES)
    revision: str | None = Field(None, description="Commit hash of the data set; null takes its main branch.")
    streaming: bool = Field(True, description="Read only what is needed; false downloads the split into the hub cache.")


class FileText(_Text):
    """Local text: .txt (one document a file), .jsonl or .parquet (one document a row)."""

    source: Literal["file"] = "file"
    path: UserPath = Field(min_length=1, description="A file, a folder of such files, or a glob pattern.")
    column: str | None = Field(None, min_length=1, description=_COLUMN)
    messages: bool = Field(False, description=_MESSAGES)


TextSettings = Annotated[PythonDocs | FineWebEdu | WikiText2 | C4 | HubText | FileText, Field(discriminator="source")]


class DataSettings(Section):
    """The three roles of text."""

    calibration: TextSettings = Field(description="Tokens from which Hessians are accumulated.")
    search: TextSettings = Field(description="Tokens on which candidates are judged.")
    evaluation: dict[Name, TextSettings] = Field(min_length=1, description="Held-out text, by name.")


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
