"""What a search strategy consists of.

A **strategy** is the pydantic class of its settings. It says from which families of variants it can pick, what it
needs, and it searches. One that evaluates candidates by the model does so in rounds (`RoundStrategy`): it makes a first
state, then one state from another, and everything else, from loading the model to going on after a kill, is done for
it. To add one, write a file in `strategies/` and name it in the registry there (docs/extending.md).

Snakemake imports this module while it parses, so whatever takes long to import is imported inside functions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from evopress.compression.base import Family, GroupRule, Method
from evopress.config.base import Name, Section
from evopress.search.target import SizeTarget, Target
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import Evaluator, SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.selection import Round, State

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Polish = Literal["none", "sequential", "asymmetric"]


@dataclass(frozen=True)
class Fitness:
    """What selection minimizes: ``kl``, ``topk_kl``, ``perplexity`` (as its logarithm), or ``hidden_error``."""

    name: str
    top_k: int = 100
    """For topk_kl: tokens of the dense model's distribution kept apart."""


@dataclass(frozen=True)
class Request:
    """Candidates that a search will have evaluated together, as far as it can tell beforehand."""

    candidates: "NDArray[np.int16]"
    """[C, units], drawn as the search draws them."""
    tokens: int
    """Tokens on which each is evaluated."""
    longest: int | None = None
    """Of each sequence only its first so many tokens are taken (None is all), as far as the text suffices."""
    precise: bool = False
    """Whether rounding in 16 bits would hide what is measured, so that they are evaluated in float32."""
    round: int = 0
    """The round that asks for them; 0 comes before the first."""
    times: float = 1.0
    """Rounds of the search for which this one stands."""


class Strategy(Section):
    """A way to choose a level for every unit; a subclass has a field ``strategy: Literal["its-name"]``."""

    families: ClassVar[tuple[type[Family], ...]] = (Family,)
    """Kinds of families whose variants it can pick from."""
    needs_hessians: ClassVar[bool] = False
    """Whether it reads the Hessians."""
    earlier: ClassVar[str] = "start_from"
    """Setting that names the searches on which it depends."""
    rounds: ClassVar[str] = "rounds"
    """What the progress bar and the plan count."""

    strategy: str = ""

    variants: Name = Field(description="Which section of `variants` the levels come from.")
    target: Target = Field(
        description="Budget over what is searched: average bits per weight at most, average sparsity at least, or, "
        "with `method: drop`, how many blocks' worth of modules go. Or the size of the file: a section, as in "
        "`{bytes: 95 MB}`, `{fraction: 0.35}` of the dense model, or `{bpw: 3.5}` over all parameters.",
    )

    tied: tuple[tuple[str, ...], ...] = Field(
        (),
        exclude_if=lambda tied: not tied,  # as results of settings that have none depend on none
        description="Linear layers that share a level wherever they are in the same module, by the last parts of their "
        "names, as in `[[q_proj, k_proj, v_proj]]`. Exports add those that their runtime fuses.",
    )
    levels: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        exclude_if=lambda levels: levels is None,
        description='Labels of the levels that may be chosen, as in `["4", "8"]`; null is all that the variants '
        "have. Exports take out those that their format cannot hold.",
    )

    polish: Polish = Field(
        "none",
        exclude=True,  # what is found is the same
        description="Whether the levels that were chosen are made once more, in sequence: each block is calibrated on "
        "what the polished ones before it return. `sequential` keeps to its dense weights, `asymmetric` makes up for "
        "how the inputs of a layer have changed, too.",
    )
    exports: tuple[Any, ...] = Field(
        ("huggingface",),
        exclude=True,  # what is found is the same
        description="Forms in which the model is written: names of exporters, or sections with `exporter` and its "
        "settings. `huggingface`, which evaluation reads, is always among them.",
    )

    @property
    def polishes(self) -> bool:
        """Whether what is chosen is made once more."""
        return self.polish != "none"

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Choose a level for every unit; all processes of the search call this, and get the same result.

        Raises:
            ConfigError: the target, the levels and the text do not allow the search.
            ArtifactError: what it reads is missing, damaged or of another model.
            SearchError: no candidate has a fitness.
        """
        raise NotImplementedError

    @property
    def share(self) -> float:
        """The target as an average over what is searched.

        Raises:
            ConfigError: it is the size of a file.
        """
        if isinstance(self.target, SizeTarget):
            raise ConfigError(f"target: {self.strategy} needs an average, not the size of a file")
        return self.target

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Why it cannot pick from variants that ``method`` makes; ``where`` is the dotted path of these settings."""
        if not isinstance(method.family, self.families):
            yield (
                f"{where}.strategy: {self.strategy} cannot choose from {self.variants!r}, whose levels are "
                f"{method.family.name}; name other variants, or use another strategy"
            )
        if isinstance(self.target, SizeTarget) and method.family.takes_modules:
            yield (
                f"{where}.target: a search over dropped modules has no size of a file as its target; say how many "
                "blocks are to go"
            )

    def grouping(self) -> GroupRule:
        """Which units may trade levels."""
        return "none"

    def depends_on(self) -> tuple[str, ...]:
        """Other searches that must be finished before."""
        return ()

    def workers(self, processes: int) -> int:
        """Devices that the search makes use of, if there may be so many processes with one each."""
        return 0

    def minimizes(self) -> Fitness | None:
        """What candidates are evaluated by; None if none is evaluated."""
        return None

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """Most tokens of the search text that are needed at once, by the setting that asks for them.

        Without a ``problem``, of any that these settings may be given.
        """
        return {}

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """What the search will have evaluated, drawn by its own code.

        Raises:
            ConfigError: it cannot solve the problem.
        """
        if self.minimizes() is None:
            return []
        raise NotImplementedError(f"{type(self).__name__} evaluates candidates, but `evaluations` does not say which")

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules: what the search did."""
        return f"found by the strategy {self.strategy}"


class SeededStrategy(Strategy):
    """A strategy that draws random numbers; the class that is made of it has a `seed`."""

    seeds: tuple[Seed, ...] | None = Field(
        None,
        exclude=True,  # what it stands for are searches of their own, which have nothing but a seed
        description="Instead of `seed`: one search for each of these, named `<name>-seed0` and so on, which the report "
        "compares as one.",
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if self.seeds is None:
            return self
        if "seed" in self.model_fields_set:
            raise ValueError("seed and seeds are both given: seeds names all of them; remove seed")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: name at least one, and each once; got {list(self.seeds)}")
        return self


class RoundStrategy(SeededStrategy):
    """A strategy that evaluates candidates by the model, round after round, and can be killed between any two of them.

    A round is what the resume log records: a generation of an evolution, a step of a greedy descent, a part of an
    enumeration. What a round does may depend on the state and the random numbers only: then a search that was killed
    goes on from its last round and ends with the same bytes, and all processes of a search decide alike.
    """

    if TYPE_CHECKING:
        seed: int  # a field of the class that is made of this one

    def minimizes(self) -> Fitness:
        """What candidates are evaluated by."""
        raise NotImplementedError

    def first_round(self, problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator") -> "Round":
        """Make the state of round 0, and a row for each evaluation that led to it."""
        raise NotImplementedError

    def next_round(
        self, state: "State", problem: "SearchProblem", evaluator: "Evaluator", rng: "np.random.Generator"
    ) -> "Round":
        """Make the state of the next round, and a row for each evaluation that led to it."""
        raise NotImplementedError

    def remaining(self, state: "State", problem: "SearchProblem") -> int:
        """Rounds that are still to be made (an estimate, but 0 only at the end)."""
        raise NotImplementedError

    def workers(self, processes: int) -> int:
        """All of them: candidates are shared out."""
        return processes

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """What its first rounds ask for, run with random fitness."""
        from evopress.search.rehearsal import rehearse

        return rehearse(self, problem, rng)

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Run all rounds, or those that are left where a killed search stopped; the best of the last state is found."""
        from evopress.search.rounds import search_in_rounds

        return search_in_rounds(self, context, problem)


class EvaluatingStrategy(RoundStrategy):
    """A strategy whose settings say what it minimizes."""

    fitness: Literal["kl", "topk_kl", "perplexity"] = Field(
        "kl", description="What selection minimizes: divergence from the dense model, or perplexity."
    )
    top_k: int = Field(100, ge=1, description="For topk_kl: tokens of the dense model's distribution kept apart.")
    seed: int = Field(0, ge=0, description="Seed of the mutations and of the choice of tokens.")

    def minimizes(self) -> Fitness:
        """The fitness of the settings."""
        return Fitness(self.fitness, self.top_k)

    def least_tokens(self) -> int:
        """Fewest tokens on which a candidate is evaluated."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_fitness(self) -> Self:
        if self.fitness == "perplexity" and self.least_tokens() < 2:
            raise ValueError("tokens: perplexity predicts the next token, so each step needs at least 2")
        return self


class GroupedStrategy(EvaluatingStrategy):
    """A strategy in which only layers of a group trade levels."""

    group_rule: GroupRule = Field(
        "size",
        description="Which layers may trade levels; where the target is the size of a file, by default any.",
    )

    @model_validator(mode="before")
    @classmethod
    def _trade_bytes(cls, values: Any) -> Any:
        sized = isinstance(values, dict) and isinstance(values.get("target"), dict | SizeTarget)
        # A byte is a byte, and the embedding has no equal to trade with.
        return {"group_rule": "none", **values} if sized else values

    def grouping(self) -> GroupRule:
        """As the settings say."""
        return self.group_rule


class SelectingStrategy(GroupedStrategy):
    """Generations of candidates, selected in steps of more and more tokens."""

    rounds: ClassVar[str] = "generations"

    generations: int = Field(150, ge=1, description="Rounds of mutation and selection.")
    offspring: int = Field(128, ge=1, description="Candidates made in each generation (lambda).")
    survivors: tuple[Count, ...] = Field(
        (16, 4, 1), description="Candidates kept by each selection step, ending in population."
    )
    tokens: tuple[Count, ...] = Field((2048, 16384, 131072), description="Tokens on which each step judges.")
    confidence: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability with which a parent is kept, in each generation, that is better than all new "
        "candidates but may look worse on the last step's tokens; 0 keeps what looks best (the paper's way).",
    )

    def parents(self) -> int:
        """Candidates that a generation leaves to the next."""
        return 1

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """By the steps: the one that sees most, or each where there is a problem."""
        if problem is None:
            return {"tokens": max(self.tokens)}
        return {f"tokens[{step}]": tokens for step, tokens in enumerate(self.tokens)}

    def least_tokens(self) -> int:
        """Of all steps."""
        return min(self.tokens, default=2)

    def remaining(self, state: "State", problem: "SearchProblem") -> int:
        """Generations that are left."""
        return self.generations - state.generation

    def select(
        self,
        state: "State",
        offspring: "NDArray[np.int16]",
        evaluator: "Evaluator",
        rng: "np.random.Generator",
    ) -> "Round":
        """The next generation from ``offspring`` [n, units] and the present one, by the steps of the settings."""
        from evopress.search.selection import Step, select_next

        steps = [Step(kept, tokens) for kept, tokens in zip(self.survivors, self.tokens, strict=True)]
        return select_next(state, offspring, steps, evaluator, rng, self.confidence)

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


class OneTextStrategy(EvaluatingStrategy):
    """A strategy that evaluates every candidate on equally many tokens."""

    tokens: int = Field(4096, ge=1, description="Tokens on which each candidate is judged.")

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """By each candidate."""
        return {"tokens": self.tokens}

    def least_tokens(self) -> int:
        """The same for all."""
        return self.tokens
