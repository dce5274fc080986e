"""A configuration from a text file, which the rest of the run then treats as any other search's."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evopress.config.base import UserPath
from evopress.search.base import Strategy

if TYPE_CHECKING:
    from evopress.search.evaluation import SearchResult
    from evopress.search.problem import SearchContext, SearchProblem


class Imported(Strategy):
    """A configuration from a text file, in either format that is published with the paper."""

    strategy: Literal["imported"] = "imported"
    file: UserPath = Field(
        min_length=1,
        description="Lines of `layer: level`; for depth, `none`, `attn`, `mlp` or `attn+mlp` for each block.",
    )

    def search(self, context: "SearchContext", problem: "SearchProblem") -> "SearchResult":
        """Read the file, and check it against the variants, the model and the target.

        Raises:
            ConfigError: it does not fit them, or is no text configuration.
            ArtifactError: the table of layers is missing or damaged.
        """
        from evopress.artifacts.tables import LAYERS, read_table
        from evopress.search.configuration import parse_candidate, require_budget
        from evopress.search.evaluation import SearchResult
        from evopress.search.text_format import read_text

        where = f"{problem.where}.file: {self.file}"
        blocks = int(read_table(context.run.layers, LAYERS)["block"].max()) + 1
        text = read_text(Path(self.file), f"{problem.where}.file")
        candidate = parse_candidate(text, problem.space, blocks, where)
        require_budget(problem, candidate, self.target, where)
        return SearchResult(candidate)

    def sentence(self) -> str:
        """End of a sentence on levels, or on dropped modules."""
        return "read from a text file"
