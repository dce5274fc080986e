"""A configuration from a text file or of another search, which the rest of the run treats as any other search's."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from evopress.config.base import Name, UserPath
from evopress.search.base import Strategy

if TYPE_CHECKING:
    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem
    from evopress.search.space import Candidate


class Imported(Strategy):
    """A configuration from a text file, in either format that is published with the paper, or of another search."""

    earlier: ClassVar[str] = "same_as"

    strategy: Literal["imported"] = "imported"
    file: UserPath | None = Field(
        None,
        min_length=1,
        description="Lines of `layer: level`; for depth, `none`, `attn`, `mlp` or `attn+mlp` for each block.",
    )
    same_as: Name | None = Field(
        None,
        description="Instead of `file`: another search, whose levels are taken; of other variants, the nearest ones.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.file is None) == (self.same_as is None):
            raise ValueError("name either a `file` or, as `same_as`, another search")
        return self

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Take what is there, and check it against the variants, the model and the target.

        Raises:
            ConfigError: it does not fit them, or is no text configuration.
            ArtifactError: the table of layers is missing or damaged.
        """
        from evopress.search.configuration import require_budget
        from evopress.search.evaluation import SearchResult

        if self.same_as is not None:
            candidate, where = problem.earlier[self.same_as], f"{problem.where}.same_as: {self.same_as}"
        else:
            candidate, where = self._read(context, problem), f"{problem.where}.file: {self.file}"
        require_budget(problem, candidate, self.target, where)
        return SearchResult(candidate)

    def _read(self, context: "SearchContext", problem: "SearchProblem") -> "Candidate":
        """The candidate that the file names."""
        from evopress.artifacts.tables import LAYERS, read_table
        from evopress.search.configuration import parse_candidate
        from evopress.search.text_format import read_text

        blocks = int(read_table(context.run.layers, LAYERS)["block"].max()) + 1
        text = read_text(Path(str(self.file)), f"{problem.where}.file")
        return parse_candidate(text, problem.space, blocks, f"{problem.where}.file: {self.file}")

    def depends_on(self) -> tuple[str, ...]:
        """The search whose levels are taken."""
        return () if self.same_as is None else (self.same_as,)

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules."""
        return "read from a text file" if self.same_as is None else f"taken from the search `{self.same_as}`"
