"""Which text calibrates, guides the search and evaluates."""

from typing import Annotated, Literal

from pydantic import Field

from evopress.config.base import Name, Section


class _Text(Section):
    tokens: int | None = Field(None, ge=1, description="Number of tokens; null takes all the text.")
    sequence_length: int = Field(2048, ge=2, description="Tokens per sequence.")
    seed: int = Field(0, ge=0, description="Seed of the choice and order of documents.")


class PythonDocs(_Text):
    """The help topics that ship with CPython, split by topic so that no topic serves two roles."""

    source: Literal["python_docs"] = "python_docs"


class FineWebEdu(_Text):
    """FineWeb-Edu sample-10BT; long documents are split, not cut."""

    source: Literal["fineweb_edu"] = "fineweb_edu"


class WikiText2(_Text):
    """wikitext-2-raw-v1, joined by blank lines and cut into windows."""

    source: Literal["wikitext2"] = "wikitext2"


class C4(_Text):
    """C4 (en): first training shard, and the first 1,100 documents of the first validation shard."""

    source: Literal["c4"] = "c4"


class HubText(_Text):
    """Any data set of the Hugging Face hub."""

    source: Literal["hub"] = "hub"
    id: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = Field(None, description="Commit hash of the data set; null takes its main branch.")


class FileText(_Text):
    """Local text: .txt (one document a file), .jsonl or .parquet (one document a row)."""

    source: Literal["file"] = "file"
    path: str
    column: str = "text"


TextSettings = Annotated[PythonDocs | FineWebEdu | WikiText2 | C4 | HubText | FileText, Field(discriminator="source")]


class DataSettings(Section):
    """The three roles of text."""

    calibration: TextSettings = Field(description="Tokens from which Hessians are accumulated.")
    search: TextSettings = Field(description="Tokens on which candidates are judged.")
    evaluation: dict[Name, TextSettings] = Field(min_length=1, description="Held-out text, by name.")
