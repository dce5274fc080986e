"""How a level is chosen for every unit."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from evopress.config.base import Name, Section, UserPath

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
GroupRule = Literal["size", "name", "none"]


class Strategy(Section):
    """Settings of a search."""

    strategy: str = ""

    variants: Name = Field(description="Which section of `variants` the levels come from.")
    target: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="Budget over what is searched: average bits per weight at most, average sparsity at least, or, "
        "with `method: drop`, how many blocks' worth of modules go.",
    )

    def workers(self, processes: int) -> int:
        """Devices that the search makes use of, if there may be so many processes with one each."""
        return 0

    def tokens_asked(self) -> dict[str, int]:
        """Most tokens of the search text that are needed at once, by the setting that asks for them."""
        return {}

    def rests_on(self) -> tuple[str, ...]:
        """Other searches that must be finished before."""
        return ()


class _Seeded(Strategy):
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


class UniformSettings(Strategy):
    """The same level everywhere; the baseline of every comparison."""

    strategy: Literal["uniform"] = "uniform"


class _Judged(_Seeded):
    """A strategy that judges candidates by running them through the model."""

    fitness: Literal["kl", "topk_kl", "perplexity"] = Field(
        "kl", description="What selection minimizes: divergence from the dense model, or perplexity."
    )
    top_k: int = Field(100, ge=1, description="For topk_kl: tokens of the dense model's distribution kept apart.")
    seed: int = Field(0, ge=0, description="Seed of the mutations and of the choice of tokens.")

    def workers(self, processes: int) -> int:
        """All of them: candidates are shared out."""
        return processes

    def least_tokens(self) -> int:
        """Fewest tokens on which a candidate is judged."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_fitness(self) -> Self:
        if self.fitness == "perplexity" and self.least_tokens() < 2:
            raise ValueError("tokens: perplexity predicts the next token, so each step needs at least 2")
        return self


class _Grouped(_Judged):
    group_rule: GroupRule = Field("size", description="Which layers may trade levels.")


class _Stepwise(_Grouped):
    """Generations of candidates, judged in steps of more and more tokens."""

    generations: int = Field(150, ge=1, description="Rounds of mutation and selection.")
    offspring: int = Field(128, ge=1, description="Candidates made in each generation (lambda).")
    survivors: tuple[Count, ...] = Field(
        (16, 4, 1), description="Candidates kept by each selection step, ending in population."
    )
    tokens: tuple[Count, ...] = Field((2048, 16384, 131072), description="Tokens on which each step judges.")

    def parents(self) -> int:
        """Candidates that a generation leaves to the next."""
        return 1

    def tokens_asked(self) -> dict[str, int]:
        """By the step that sees most."""
        return {"tokens": max(self.tokens)}

    def least_tokens(self) -> int:
        """Of all steps."""
        return min(self.tokens, default=2)

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if len(self.survivors) != len(self.tokens):
            raise ValueError(
                f"survivors has {len(self.survivors)} steps and tokens has {len(self.tokens)}: give one each per step"
            )
        if self.survivors[-1:] != (self.parents(),):
            raise ValueError(
                f"survivors must end in population ({self.parents()}, the next parents), got {list(self.survivors)}"
            )
        if any(later > earlier for earlier, later in zip(self.survivors, self.survivors[1:], strict=False)):
            raise ValueError(f"survivors must not grow from step to step, got {list(self.survivors)}")
        if self.survivors[0] > self.offspring:
            raise ValueError(f"survivors: the first step keeps {self.survivors[0]} of only {self.offspring} offspring")
        return self


class EvolutionSettings(_Stepwise):
    """The (1+lambda) evolutionary search of EvoPress (arXiv 2410.14649, algorithm 1)."""

    strategy: Literal["evolution"] = "evolution"
    start: Literal["even", "sensitivity"] = Field(
        "even",
        description="Where the search starts: even (the paper's way), or from the effect of each layer alone on the "
        "fitness and on the final hidden states, which finds good configurations with few tokens.",
    )
    start_from: tuple[Name, ...] = Field(
        (),
        description="Other searches whose configurations are starts, too; where one misses the budget, random units "
        "are brought to it. The evolution goes on from the best start.",
    )
    sensitivity_tokens: int = Field(
        512, ge=1, description="For start: sensitivity: tokens on which each layer alone is judged."
    )
    initial_candidates: int = Field(128, ge=1, description="Random starts when the target is not one of the levels.")
    initial_tokens: int = Field(2048, ge=1, description="Tokens on which starts are compared.")
    population: int = Field(
        1, ge=1, description="Parents of the next generation; each offspring comes from a random one of them."
    )
    switches: int | None = Field(
        None, ge=1, description="Level switches of each offspring; null draws min(U(1,3), U(1,3)), as the paper does."
    )

    def parents(self) -> int:
        """The population."""
        return self.population

    def rests_on(self) -> tuple[str, ...]:
        """Those that it starts from."""
        return self.start_from

    def tokens_asked(self) -> dict[str, int]:
        """By steps and start."""
        asked = {**super().tokens_asked(), "initial_tokens": self.initial_tokens}
        return asked | ({"sensitivity_tokens": self.sensitivity_tokens} if self.start == "sensitivity" else {})

    def least_tokens(self) -> int:
        """Of all steps and of the start."""
        return min(*self.tokens, self.initial_tokens, self.sensitivity_tokens)


class RandomSettings(_Stepwise):
    """Random search: candidates from all over the space and the best so far, judged in the same steps."""

    strategy: Literal["random"] = "random"


class _OneText(_Judged):
    """A strategy that judges every candidate on equally many tokens."""

    tokens: int = Field(4096, ge=1, description="Tokens on which each candidate is judged.")

    def tokens_asked(self) -> dict[str, int]:
        """By each candidate."""
        return {"tokens": self.tokens}

    def least_tokens(self) -> int:
        """The same for all."""
        return self.tokens


class GreedySettings(_OneText, _Grouped):
    """Greedy descent: from every unit at its dearest level, by the step down that costs the fitness least."""

    strategy: Literal["greedy"] = "greedy"
    per_round: int = Field(
        1, ge=1, description="Steps down taken at once, the best ones, before all are judged again: more is faster."
    )


class BruteSettings(_OneText):
    """Brute force over whole blocks: every choice of blocks to drop is judged; for depth pruning."""

    strategy: Literal["brute"] = "brute"
    max_candidates: int = Field(
        10_000, ge=1, description="Refuse a search of more candidates than this; each is judged on `tokens` tokens."
    )


class DpSettings(_Seeded):
    """Dynamic programming: the levels of least summed error of the layers, each taken alone."""

    strategy: Literal["dp"] = "dp"
    errors: Literal["table", "propagated"] = Field(
        "table",
        description="Whose errors are summed: the relative output error of each layer, as made, or that of the model's "
        "final hidden states when the layer alone is compressed.",
    )
    tokens: int = Field(4096, ge=1, description="For errors: propagated: tokens on which each is measured.")
    group_rule: GroupRule = Field(
        "none", description="Which layers share a budget: those of one `size` or `name`, or all (`none`)."
    )
    resolution: int = Field(
        100_000,
        ge=1,
        description="Steps into which a budget is cut where costs have no common measure that is coarser.",
    )
    seed: int = Field(0, ge=0, description="Seed of the choice of tokens.")

    def workers(self, processes: int) -> int:
        """Errors from the table ask no model."""
        return processes if self.errors == "propagated" else 0

    def tokens_asked(self) -> dict[str, int]:
        """None, where errors are in the table."""
        return {"tokens": self.tokens} if self.errors == "propagated" else {}


class ScoresSettings(_Seeded):
    """Block scores: the blocks that matter least, each judged alone, are dropped; for depth pruning."""

    strategy: Literal["scores"] = "scores"
    score: Literal["cosine", "window_cosine", "norm_ratio", "l2", "normalized_l2", "perplexity", "kl"] = Field(
        "cosine",
        description="What a block does to hidden states (`cosine`: ShortGPT; `window_cosine`: neighbouring blocks "
        "together; `norm_ratio`: weight subcloning; `l2`, `normalized_l2`), or what its removal alone does to the "
        "model (`perplexity`: Shortened Llama; `kl`).",
    )
    tokens: int = Field(8192, ge=2, description="Tokens on which scores are measured.")
    seed: int = Field(0, ge=0, description="Seed of the choice of tokens.")

    def judges(self) -> bool:
        """Whether blocks are removed to score them."""
        return self.score in ("perplexity", "kl")

    def workers(self, processes: int) -> int:
        """Hidden states are looked at in one run."""
        return processes if self.judges() else 1

    def tokens_asked(self) -> dict[str, int]:
        """By each score."""
        return {"tokens": self.tokens}


class OwlSettings(Strategy):
    """OWL (arXiv 2310.05175): blocks whose weights have more outliers keep more; for sparsity variants."""

    strategy: Literal["owl"] = "owl"
    owl_lambda: float = Field(0.08, ge=0, lt=1, description="Half of the span of the blocks' sparsities.")
    owl_m: float = Field(
        5.0, gt=0, description="An outlier's score |w| ||x|| exceeds this many times the block's mean."
    )

    def workers(self, processes: int) -> int:
        """One, that scores weights."""
        return 1


class ImportedSettings(Strategy):
    """A configuration from a text file, in either format that is published with the paper."""

    strategy: Literal["imported"] = "imported"
    file: UserPath = Field(
        min_length=1,
        description="Lines of `layer: level`; for depth, `none`, `attn`, `mlp` or `attn+mlp` for each block.",
    )


SearchSettings = Strategy
