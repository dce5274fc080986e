"""Which text calibrates, guides the search and evaluates."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evopress.config.base import Name, Section, UserPath

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
    """Local text: .txt, .md or .rst (one document a file), .jsonl or .parquet (one document a row)."""

    source: Literal["file"] = "file"
    path: UserPath = Field(
        min_length=1, description="A file, a folder, or a glob pattern; of a folder, .md and .rst are left out."
    )
    column: str | None = Field(None, min_length=1, description=_COLUMN)
    messages: bool = Field(False, description=_MESSAGES)


TextSettings = Annotated[PythonDocs | FineWebEdu | WikiText2 | C4 | HubText | FileText, Field(discriminator="source")]


class DataSettings(Section):
    """The three roles of text."""

    calibration: TextSettings = Field(description="Tokens from which Hessians are accumulated.")
    search: TextSettings = Field(description="Tokens on which candidates are judged.")
    evaluation: dict[Name, TextSettings] = Field(min_length=1, description="Held-out text, by name.")


# How the Hessians are accumulated.


class HessianSettings(Section):
    """How the Hessians are accumulated."""

    shards: int = Field(1, ge=1, description="Token shards that run as separate jobs and are then summed.")
    keep: bool = Field(
        True, description="False removes a block's Hessians when all that need them are done; new levels remake them."
    )
