"""Settings of the studies: the section `studies` of a run's settings, and what each stage is given of it."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from evopress.config.base import Name, Section, drop_removed

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
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
    switches: int = Field(30, ge=1, description="Most level switches between an even start and a candidate.")
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


class ReportedStudies(Section):
    """What the report says of studies: a slice of the settings, made by the workflow."""

    groups: dict[str, tuple[str, ...]] = Field({})
    """Searches by the name in the settings, where any has several seeds; else nothing."""
    convergence: bool = False
    monotonicity: tuple[str, ...] = ()
    """Names of the studies."""


class StudiesSettings(Section):
    """Studies to be part of the report; each is also a target of its own."""

    convergence: ConvergenceSettings | None = None
    monotonicity: Annotated[dict[Name, MonotonicitySettings], BeforeValidator(drop_removed)] = Field(
        {}, description="Studies by name; null removes an entry."
    )


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
