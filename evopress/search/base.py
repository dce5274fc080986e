"""What a search strategy consists of.

A **strategy** is the pydantic class of its settings. It says from which families of variants it can pick, what it
needs, and it searches. One that evaluates candidates by the model does so in rounds (`search/rounds.py`). To add one,
write a file in `strategies/` and name it in the registry there (docs/extending.md).

Snakemake imports this module while it parses, so whatever takes long to import is imported inside functions.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from evopress.compression.base import Family, GroupRule, Method
from evopress.config.base import Section, safe_name
from evopress.config.data import TextSettings
from evopress.search.offered import Constraints, FactsOf
from evopress.search.target import SizeTarget, Target
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.space import Space

Seed = Annotated[int, Field(ge=0)]
Polish = Literal["none", "sequential", "asymmetric"]


def _sources(names: Any) -> Any:
    """The name of variants, or the names of several, each once; of a list that has one, that."""
    listed = list(names) if isinstance(names, list | tuple) else [names]
    if not listed or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"must be the name of variants, or several, as in [gguf, drop], not {names!r}")
    if twice := {name for name in listed if listed.count(name) > 1}:
        raise ValueError(f"{sorted(twice)[0]!r} is named twice")
    found = tuple(map(safe_name, listed))
    return found if len(found) > 1 else found[0]


Sources = Annotated[str | tuple[str, ...], BeforeValidator(_sources)]


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


class EffectsSettings(Section):
    """All that single effects depend on, beside model, text and variants."""

    variants: Sources
    tied: tuple[tuple[str, ...], ...] = ()
    levels: tuple[str, ...] | None = None
    fitness: Literal["kl", "topk_kl", "perplexity"] = "kl"
    top_k: int | None = Field(None, description="For topk_kl alone.")
    tokens: int = Field(ge=1)
    each: int = Field(1, ge=1, le=2, description="Levels at which each layer is measured.")

    @property
    def name(self) -> str:
        """Name of their folder: the variants, and a digest of everything here."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"{'-'.join(self.sources)}-{digest[:8]}"

    @property
    def where(self) -> str:
        """What messages call them."""
        return f"single effects of {' and '.join(self.sources)}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the variants."""
        return (self.variants,) if isinstance(self.variants, str) else self.variants

    def constraints(self) -> Constraints:
        """What is asked of the levels."""
        return Constraints(self.where, tied=self.tied, levels=self.levels)

    def minimizes(self) -> Fitness:
        """What a unit's effect is measured in."""
        return Fitness(self.fitness, self.top_k or Fitness.top_k)

    def tokens_asked(self) -> dict[str, int]:
        """By the setting of a search that asks for them."""
        return {"sensitivity_tokens": self.tokens}

    def workers(self, processes: int) -> int:
        """All processes: candidates are shared out."""
        return processes

    def requests(self, space: "Space") -> list[Request]:
        """What is evaluated, for the plan."""
        from evopress.search.sensitivity import each_at_its_levels, piece_length

        candidates, _ = each_at_its_levels(space, self.each)
        return [Request(candidates, self.tokens, longest=piece_length(self.tokens), precise=True)]


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
    joint: ClassVar[bool] = False
    """Whether it can choose from several variants at once."""

    strategy: str = ""

    variants: Sources = Field(
        description="Which section of `variants` the levels come from. Several, as in `[gguf, drop]`, share one budget "
        "in bytes: a layer gets a level of any of them, or leaves with its module."
    )
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
        "how the inputs of a layer have changed, too. Left out, it is `sequential` where `strategy: auto` picks from "
        "variants of `sparsegpt`.",
    )
    exports: tuple[Any, ...] = Field(
        ("huggingface",),
        exclude=True,  # what is found is the same
        description="Forms in which the model is written: names of exporters, or sections with `exporter` and its "
        "settings. `huggingface`, which evaluation reads, is always among them.",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the variants that the levels come from."""
        return (self.variants,) if isinstance(self.variants, str) else self.variants

    def of(self, source: str) -> Self:
        """The same search as if ``source``, one of its variants, were all."""
        return self.model_copy(update={"variants": source})

    @property
    def polishes(self) -> bool:
        """Whether what is chosen is made once more."""
        return self.polish != "none"

    def resolved(self, method: Method, text: TextSettings) -> "Strategy":
        """The strategy that these settings stand for.

        Args:
            method: makes the variants that are picked from.
            text: that the search judges on.
        """
        return self

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
        family, who = method.family, f"{where}.strategy: {self.strategy}"
        if isinstance(family, self.families):
            return
        if family.takes_modules:
            yield (
                f"{who} chooses levels of linear layers, but {self.variants!r} drops modules; use `scores`, `greedy` "
                "or `evolution`"
            )
        elif all(kind.takes_modules for kind in self.families):
            yield (
                f"{who} drops whole blocks, but {self.variants!r} compresses layers; name variants of `method: drop`, "
                "or use another strategy"
            )
        else:
            yield (
                f"{who} cannot choose from {self.variants!r}, whose levels are {family.name}; name other variants, or "
                "use another strategy"
            )

    def grouping(self) -> GroupRule:
        """Which units may trade levels."""
        return "none"

    def constraints(self, where: str, file: FactsOf | None = None) -> Constraints:
        """What it asks of the levels; ``file`` gives what is known of the file of which the target is the size."""
        return Constraints(where, self.target, self.grouping(), self.tied, self.levels, file)

    def sizes_wanted(self) -> tuple[int, ...]:
        """Sizes of the file, in bytes, for each of which it stands for a search; none where it is one itself."""
        return ()

    def depends_on(self) -> tuple[str, ...]:
        """Other searches that must be finished before."""
        return ()

    def effects(self) -> EffectsSettings | None:
        """Single effects that it starts from, which are measured before; None if it needs none."""
        return None

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
