"""An exporter of one file: what was chosen, as a table that any spreadsheet opens."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from evopress.config.context import StageContext
from evopress.export.base import Exporter
from evopress.search.configuration import Configuration


class LevelsCsv(Exporter):
    """The level of each unit as CSV."""

    library: ClassVar[str] = "pandas"
    relation: ClassVar[str | None] = None

    exporter: Literal["csv"] = "csv"
    separator: str = Field(",", min_length=1, max_length=1, description="What stands between two columns.")

    def write(self, context: StageContext, search: str, folder: Path) -> None:
        """Write `levels.csv`."""
        table = Configuration.read(context.run, search).table
        table[["unit", "level", "bytes"]].to_csv(folder / "levels.csv", sep=self.separator, index=False)

    def usage(self, folder: str) -> str:
        """With pandas."""
        return f'`pandas.read_csv("{folder}/levels.csv", sep="{self.separator}")`'
