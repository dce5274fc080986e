"""Block scores: whole blocks are dropped, those that matter least when each is looked at alone.

How much a block matters is read from what it does to hidden states (`block_scores`), or from what its removal alone
does to the model: the perplexity without it (Shortened Llama, arXiv 2402.02834), or the divergence from the dense
model. The window scores drop consecutive blocks, those which together change hidden states least.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from evopress.compression.base import Family, Method
from evopress.compression.families import Modules
from evopress.search.base import Fitness, Request
from evopress.search.evaluating import Enumeration, fitness_of_each
from evopress.util.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.space import Candidate, Space

WINDOWS = ("window_cosine", "window_mean_cosine")
"""Scores of consecutive blocks together."""
_ARXIV = "https://arxiv.org/abs/"
_WINDOW = (
    "chosen as those of the consecutive blocks that together change the direction of hidden states least "
    f"([The Unreasonable Ineffectiveness of the Deeper Layers]({_ARXIV}2403.17887))"
)
_SENTENCES = {
    "cosine": f"chosen by how little their block turns hidden states ([ShortGPT]({_ARXIV}2403.03853))",
    "window_cosine": f"{_WINDOW}, by the mean angle",
    "window_mean_cosine": f"{_WINDOW}, by the mean cosine",
    "norm_ratio": "chosen by how little their block adds to hidden states, relative to what leaves it "
    f"([weight subcloning]({_ARXIV}2312.09299))",
    "l2": "chosen by how little their block changes hidden states",
    "l2_normalized": "chosen by how little their block changes hidden states, each scaled to length one",
    "normalized_l2": "chosen by how little their block changes hidden states, relative to what enters it",
    "perplexity": f"chosen by the perplexity without their block ([Shortened Llama]({_ARXIV}2402.02834))",
    "kl": "chosen by the divergence from the original without their block",
}


class BlockScores(Enumeration):
    """Block scores: the blocks that matter least, each judged alone, are dropped; for depth pruning."""

    families: ClassVar[tuple[type[Family], ...]] = (Modules,)
    part: ClassVar[int] = 16

    strategy: Literal["scores"] = "scores"
    score: Literal[
        "cosine",
        "window_cosine",
        "window_mean_cosine",
        "norm_ratio",
        "l2",
        "l2_normalized",
        "normalized_l2",
        "perplexity",
        "kl",
    ] = Field(
        "cosine",
        description="What a block does to hidden states (`cosine`: ShortGPT; `window_cosine`: neighbouring blocks "
        "together, by their mean angle, or by their mean cosine as `window_mean_cosine`; `norm_ratio`: weight "
        "subcloning; `l2`: distance; `l2_normalized`: distance of the states scaled to length one; `normalized_l2`: "
        "distance as a share of what enters), or what its removal alone does to the model (`perplexity`: Shortened "
        "Llama; `kl`).",
    )
    tokens: int = Field(8192, ge=2, description="Tokens on which scores are measured.")
    seed: int = Field(0, ge=0, description="Seed of the choice of tokens.")

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Drop the blocks of least score."""
        from evopress.search.evaluation import Effort, SearchResult

        space, whole, count = problem.space, self._droppable(problem), int(self.share)
        if self.removes():
            result = super().search(context, problem)
            values = dict(zip(whole, fitness_of_each(result).tolist(), strict=True))
            return replace(result, candidate=without(space, least(values, count)))
        measured = self._measured(context, problem, count)
        if self.score in WINDOWS:
            chosen = least_window(measured, whole, count, f"{problem.where}.target")
        else:
            chosen = least({block: float(measured[block]) for block in whole}, count)
        return SearchResult(without(space, chosen), effort=Effort(self.tokens))

    def removes(self) -> bool:
        """Whether blocks are removed to score them; else hidden states are looked at in one run."""
        return self.score in ("perplexity", "kl")

    def candidates(self, problem: "SearchProblem") -> "NDArray[np.int16]":
        """The model without each block that may go as a whole."""
        import numpy as np

        return np.stack([without(problem.space, [block]) for block in self._droppable(problem)])

    def _droppable(self, problem: "SearchProblem") -> list[int]:
        """Blocks that may go as a whole.

        Raises:
            ConfigError: there are fewer than are to go.
        """
        whole, count = whole_blocks(problem.space), int(self.share)
        if len(whole) < count:
            raise ConfigError(
                f"{problem.where}.target: {count} whole blocks are to be dropped, but only {len(whole)} may be; lower "
                f"it, or exclude fewer modules"
            )
        return whole

    def _measured(self, context: "SearchContext", problem: "SearchProblem", window: int) -> "NDArray[np.float64]":
        """Score of each block, or of each window of ``window`` blocks by its first."""
        import numpy as np

        from evopress.search.engine.block_scores import score_of_text

        rng = np.random.Generator(np.random.PCG64(self.seed))
        blocks = window if self.score in WINDOWS else 1
        return score_of_text(context, self.score, blocks, self.tokens, rng, problem.where)

    def problems(self, where: str, method: Method) -> Iterator[str]:
        """Units must be modules or blocks that are dropped."""
        yield from super().problems(where, method)
        if getattr(method, "unit", "") == "pair":
            yield (
                f"{where}.strategy: scores are of single blocks, but {self.variants!r} drops pairs; set its `unit` to "
                f"`block`"
            )

    def minimizes(self) -> Fitness:
        """What a removal alone is measured by."""
        return Fitness(self.score)

    def workers(self, processes: int) -> int:
        """Hidden states are looked at by one."""
        return processes if self.removes() else 1

    def tokens_asked(self, problem: "SearchProblem | None" = None) -> dict[str, int]:
        """By each score."""
        return {"tokens": self.tokens}

    def evaluations(self, problem: "SearchProblem", rng: "np.random.Generator") -> list[Request]:
        """None, where hidden states are looked at."""
        return super().evaluations(problem, rng) if self.removes() else []

    def sentence(self) -> str:
        """End of a sentence on dropped modules."""
        return _SENTENCES[self.score]


def whole_blocks(space: "Space") -> list[int]:
    """Blocks of which both modules may be dropped."""
    kinds: dict[int, set[str]] = {}
    for unit in space.units:
        for block, kind in unit.modules:
            kinds.setdefault(block, set()).add(kind)
    return sorted(block for block, found in kinds.items() if len(found) == 2)


def without(space: "Space", blocks: list[int]) -> "Candidate":
    """Candidate that drops all modules of ``blocks``, and no other."""
    import numpy as np

    gone = [unit.modules and all(block in blocks for block, _ in unit.modules) for unit in space.units]
    return np.where(gone, 0, space.top).astype(np.int16)


def least(values: dict[int, float], count: int) -> list[int]:
    """The ``count`` blocks of least value; of equals the later ones, which disturb fewer blocks behind them."""
    return sorted(values, key=lambda block: (values[block], -block))[:count]


def least_window(values: "NDArray[np.float64]", whole: list[int], count: int, where: str) -> list[int]:
    """The ``count`` consecutive blocks of least value.

    Raises:
        ConfigError: so many consecutive blocks cannot all be dropped.
    """
    possible = {
        first: float(value) for first, value in enumerate(values) if set(range(first, first + count)) <= set(whole)
    }
    if not possible:
        raise ConfigError(f"{where}: there are no {count} consecutive blocks that may all be dropped; exclude fewer")
    first = least(possible, 1)[0]
    return list(range(first, first + count))
