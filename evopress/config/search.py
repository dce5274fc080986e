"""How a level is chosen for every unit."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evopress.config.base import Name, Section

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class _Strategy(Section):
    variants: Name = Field(description="Which section of `variants` the levels come from.")
    target: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="Budget over what is searched: average bits per weight at most, average sparsity at least, or, with "
        "`method: drop`, how many blocks' worth of modules go.",
    )


class _Seeded(_Strategy):
    """A strategy that draws random numbers; the class that is made of it has a `seed`."""

    seeds: tuple[Seed, ...] | None = Field(
        None,
        exclude=True,  # what it stands for are searches of their own, which have nothing but a seed
        description="Instead of `seed`: one search for each of these, named `<name>-seed0` and so on, which the report "
        "compares as one.",
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> "_Seeded":
        if self.seeds is None:
            return self
        if "seed" in self.model_fields_set:
            raise ValueError("seed and seeds are both given: seeds names all of them; remove seed")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: name at least one, and each once; got {list(self.seeds)}")
        return self


class UniformSettings(_Strategy):
    """The same level everywhere; the baseline of every comparison."""

    strategy: Literal["uniform"] = "uniform"


class EvolutionSettings(_Seeded):
    """The (1+lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1)."""

    strategy: Literal["evolution"] = "evolution"
    generations: int = Field(150, ge=1, description="Rounds of mutation and selection.")
    offspring: int = Field(128, ge=1, description="Candidates made in each generation (lambda).")
    survivors: tuple[Count, ...] = Field(
        (16, 4, 1), description="Candidates kept by each selection step, ending in population."
    )
    tokens: tuple[Count, ...] = Field((2048, 16384, 131072), description="Tokens on which each step judges.")
    fitness: Literal["kl", "topk_kl", "perplexity"] = Field(
        "kl", description="What selection minimizes: divergence from the dense model, or perplexity."
    )
    top_k: int = Field(100, ge=1, description="For topk_kl: tokens of the dense model's distribution kept apart.")
    group_rule: Literal["size", "name", "none"] = Field("size", description="Which layers may trade levels.")
    start: Literal["even", "sensitivity"] = Field(
        "even",
        description="Where the search starts: even (the paper's way), or from the effect of each layer alone on the "
        "fitness, which finds good configurations with few tokens.",
    )
    sensitivity_tokens: int = Field(
        512, ge=1, description="For start: sensitivity: tokens on which each layer alone is judged, at two levels."
    )
    initial_candidates: int = Field(128, ge=1, description="Random starts when the target is not one of the levels.")
    initial_tokens: int = Field(2048, ge=1, description="Tokens on which starts are compared.")
    population: int = Field(
        1, ge=1, description="Parents of the next generation; each offspring comes from a random one of them."
    )
    switches: int | None = Field(
        None, ge=1, description="Level switches of each offspring; null draws min(U(1,3), U(1,3)), as the paper does."
    )
    seed: int = Field(0, ge=0, description="Seed of the mutations and of the choice of tokens.")

    @model_validator(mode="after")
    def _check_steps(self) -> "EvolutionSettings":
        if len(self.survivors) != len(self.tokens):
            raise ValueError(
                f"survivors has {len(self.survivors)} steps and tokens has {len(self.tokens)}: give one each per step"
            )
        if self.survivors[-1:] != (self.population,):
            raise ValueError(
                f"survivors must end in population ({self.population}, the next parents), got {list(self.survivors)}"
            )
        if any(later > earlier for earlier, later in zip(self.survivors, self.survivors[1:], strict=False)):
            raise ValueError(f"survivors must not grow from step to step, got {list(self.survivors)}")
        if self.survivors[0] > self.offspring:
            raise ValueError(f"survivors: the first step keeps {self.survivors[0]} of only {self.offspring} offspring")
        if self.fitness == "perplexity" and min(*self.tokens, self.initial_tokens, self.sensitivity_tokens) < 2:
            raise ValueError("tokens: perplexity predicts the next token, so each step needs at least 2")
        return self


class OwlSettings(_Strategy):
    """OWL (arXiv 2310.05175): blocks whose weights have more outliers keep more; for sparsity variants."""

    strategy: Literal["owl"] = "owl"
    owl_lambda: float = Field(0.08, ge=0, lt=1, description="Half of the span of the blocks' sparsities.")
    owl_m: float = Field(
        5.0, gt=0, description="An outlier's score |w| ||x|| exceeds this many times the block's mean."
    )


class ImportedSettings(_Strategy):
    """A configuration from a text file, in either format that is published with the paper."""

    strategy: Literal["imported"] = "imported"
    file: str = Field(
        min_length=1, description="Lines of `layer: level`; for depth, `none`, `attn`, `mlp` or `attn+mlp` for each block."
    )


SearchSettings = Annotated[
    UniformSettings | EvolutionSettings | OwlSettings | ImportedSettings, Field(discriminator="strategy")
]
