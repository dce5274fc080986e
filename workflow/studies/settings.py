"""Settings of the studies: the section `studies` of a run's settings, and what each stage is given of it."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from evopress.compression.gguf_types import GGUF_TYPES
from evopress.config.base import Name, Section, UserPath, drop_removed
from evopress.util.errors import ConfigError
from studies.recipes import BASES

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
INSTALL = "pip install -e '.[peers]', or name a program in studies.peers.quantizer"
"""How to have a `llama-quantize`."""
_PACKAGE = "ik_llama_cpp"
LEAST_SEQUENCES = 8
"""Fewer sequences give no standard error to rely on."""


class ConvergenceSettings(Section):
    """Generations that the engine takes to the optimum of linear objectives on bit strings; needs no model."""

    units: tuple[Annotated[int, Field(ge=2)], ...] = Field((16, 32, 64), description="Lengths n of the strings.")
    kept: tuple[Share, ...] = Field((0.25, 0.5), description="Ones, k, as a share of n.")
    offspring: tuple[Count, ...] = Field((1, 2, 4, 8), description="Offspring in each generation, lambda.")
    switches: tuple[Count | None, ...] = Field(
        (1, None), description="Switches of each offspring; the theorem has 1, null is the search's own mutation."
    )
    runs: int = Field(10, ge=1, description="Runs of each case, with seeds 0, 1, ...")


class MonotonicitySettings(Section):
    """Pairs of candidates of which the one with less summed error, or with strictly more kept, is worse."""

    variants: Name = Field(description="Which section of `variants` the levels come from.")
    target: float = Field(gt=0, allow_inf_nan=False, description="Budget of the candidates, as that of a search.")
    fitness: Literal["kl", "perplexity"] = Field("perplexity", description="What candidates are judged by.")
    candidates: int = Field(24, ge=2, description="Random candidates that meet the budget.")
    raises: int = Field(8, ge=0, description="Candidates made of each of them by keeping more of one unit.")
    switches: int = Field(30, ge=1, description="Most level switches between a uniform start and a candidate.")
    tokens: int = Field(1024, ge=2, description="Tokens on which pairs are looked for.")
    pairs: int = Field(8, ge=1, description="Most pairs of each claim that are judged again.")
    confirm_tokens: int = Field(
        8192, ge=2, description="Tokens on which they are: of sequences on which no pair was looked for."
    )
    least_t: float = Field(
        4.0,
        gt=0,
        description="Standard errors of the paired difference that confirm a pair. 4 of 32 sequences: 1/5000.",
    )
    seed: int = Field(0, ge=0, description="Seed of the candidates and of the choice of text.")


def _known_mixture(name: str) -> str:
    if name not in BASES:
        raise ValueError(f"unknown type {name!r}; llama.cpp's mixtures are {', '.join(BASES)}")
    return name


def _known_type(name: str | None) -> str | None:
    if name is not None and name not in GGUF_TYPES:
        raise ValueError(f"unknown type {name!r}; there are {', '.join(GGUF_TYPES)}")
    return name


Mixture = Annotated[str, AfterValidator(_known_mixture)]
EmbeddingType = Annotated[str | None, AfterValidator(_known_type)]


class PeerSettings(Section):
    """One file that llama.cpp's quantizer makes: a slice of the settings, made by the workflow."""

    type: Mixture
    embedding: EmbeddingType = None
    quantizer: UserPath | None = None

    @property
    def name(self) -> str:
        """As tables and files are called."""
        return self.type if self.embedding is None else f"{self.type}-{self.embedding}"


class PeersSettings(Section):
    """Files that llama.cpp's own quantizer makes of the model, beside searches that end at exactly their sizes."""

    types: tuple[Mixture, ...] = Field(
        ("IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_0"),
        min_length=1,
        description="Types of files, as llama.cpp names its mixtures.",
    )
    embeddings: tuple[EmbeddingType, ...] = Field(
        (None, "Q4_0"), min_length=1, description="Types of the token embedding; null is what the file's type takes."
    )
    quantizer: UserPath | None = Field(
        None, description="The program `llama-quantize`; null is that of the package `ik-llama-cpp-python`."
    )
    against: Name | None = Field(
        None,
        description="A search whose settings are copied for each file, with the file's size for its target; null "
        "measures the files alone.",
    )

    def peers(self) -> dict[str, PeerSettings]:
        """Every file by its name."""
        made = (
            PeerSettings(type=kind, embedding=embedding, quantizer=self.quantizer)
            for embedding in dict.fromkeys(self.embeddings)
            for kind in dict.fromkeys(self.types)
        )
        return {peer.name: peer for peer in made}


def find_program(named: str | None) -> Path:
    """The `llama-quantize` of the settings, or that of the installed package.

    Raises:
        ConfigError: there is none.
    """
    if named is not None:
        if found := shutil.which(named):
            return Path(found)
        raise ConfigError(f"studies.peers.quantizer: {named!r} is no program; check the path")
    package = find_spec(_PACKAGE)
    path = Path(package.origin).parent / "bin" / "llama-quantize" if package and package.origin else None
    if path is None or not path.is_file():
        raise ConfigError(f"studies.peers: there is no llama-quantize; {INSTALL}")
    return path


class ReportedStudies(Section):
    """What the report says of studies: a slice of the settings, made by the workflow."""

    groups: dict[str, tuple[str, ...]] = Field({})
    """Searches by the name in the settings, where any has several seeds; else nothing."""
    convergence: bool = False
    monotonicity: tuple[str, ...] = ()
    """Names of the studies."""
    peers: bool = False


class StudiesSettings(Section):
    """Studies to be part of the report; each is also a target of its own."""

    convergence: ConvergenceSettings | None = None
    monotonicity: Annotated[dict[Name, MonotonicitySettings], BeforeValidator(drop_removed)] = Field(
        {}, description="Studies by name; null removes an entry."
    )
    peers: PeersSettings | None = None


def require_text(study: MonotonicitySettings, sequences: int, length: int) -> tuple[int, int]:
    """Sequences on which pairs are looked for, and those on which they are confirmed.

    Args:
        study: how many tokens it asks for.
        sequences: of the search text.
        length: tokens of each.

    Raises:
        ValueError: the text is too short for both, or too few sequences are asked for.
    """
    look, confirm = (-(-tokens // length) for tokens in (study.tokens, study.confirm_tokens))
    if look < 2:
        raise ValueError(f"tokens: {study.tokens} tokens are one sequence; ask for at least {length + 1}")
    if look + confirm > sequences:
        raise ValueError(
            f"tokens and confirm_tokens take {look} + {confirm} sequences, but the search text has {sequences}; lower "
            f"them, or raise data.search.tokens"
        )
    if confirm < LEAST_SEQUENCES:
        raise ValueError(
            f"confirm_tokens: {study.confirm_tokens} tokens are {confirm} sequences, too few for a standard error; ask "
            f"for at least {LEAST_SEQUENCES * length}"
        )
    return look, confirm
